"""AdamW and Muon against PyTorch's own, on fp32 weights and on bf16 weights with exact masters."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference.master import join_master
from nmoe.rdep.world import alone
from nmoe.train import muon
from nmoe.train.gradients import Gradients
from nmoe.train.muon import muon_batches
from nmoe.train.optim import MUON_RMS, Optimizer, flatten, group_settings
from nmoe.train.schema import OptimConfig
from torch import nn

STEPS = 8
ONE = torch.tensor(1.0)
OK, NOT_OK = (torch.tensor(word, dtype=torch.int32) for word in (1, 0))


def config(**keys):
    base = {"lr_dense": 3e-3, "lr_router": 1e-3, "lr_expert": 2e-3, "weight_decay": 0.1, "beta2_expert": 0.9}
    return OptimConfig(**{**base, **keys})


def shapes():
    return {
        "embed.weight": (20, 8),
        "layers.0.attn_norm.weight": (8,),
        "layers.0.attn.wq.weight": (12, 8),
        "layers.0.attn.wo.weight": (8, 12),
        "layers.0.ffn.router.weight": (4, 8),
        "layers.0.ffn.experts.w13": (4, 2, 6, 8),
        "layers.0.ffn.experts.w2": (4, 8, 6),
        "head.weight": (20, 8),
    }


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes().items()}


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}


class Run:
    """An optimizer and the accumulators that it reads."""

    def __init__(self, ours, settings):
        ops, flat = select_ops("reference", "cpu"), flatten(ours, settings, alone("cpu"))
        self.accumulated, self.optimizer = Gradients(flat, ops), Optimizer(flat, settings, ops)
        self.groups = flat.groups

    def step(self, grads, step=1, lr_factor=1.0, grad_scale=ONE, ok=OK):
        for name, (grad,) in self.accumulated.parts.items():
            grad.copy_(grads[name])
        self.optimizer.set_step(step=step, lr_factor=lr_factor)
        self.optimizer.step(self.accumulated, grad_scale=grad_scale, ok=ok)

    def buffers(self):
        """All that an update may change, flat."""
        held = [tensor for group in self.optimizer._groups for tensor in (group.residual, *group.moments.values())]
        return [group.weight for group in self.groups] + [tensor for tensor in held if tensor is not None]


def state_of(optimizer):
    """By name; one rank has every tensor in one piece."""
    return {piece.name: piece.tensor for pieces in optimizer.state.values() for piece in pieces}


def run(ours, settings):
    whole = Run(ours, settings)
    for step in range(1, STEPS + 1):
        whole.step(gradients(step), step)
    return whole.optimizer


def run_torch(theirs, make):
    optimizers = [make(name, parameter) for name, parameter in theirs.items()]
    for step in range(1, STEPS + 1):
        for (name, parameter), optimizer in zip(theirs.items(), optimizers, strict=True):
            parameter.grad = gradients(step)[name].view_as(parameter)
            optimizer.step()


def adamw_like_ours(settings, name, parameter):
    role = (
        "embed" if name.split(".")[0] in ("embed", "head")
        else "norm" if "norm" in name
        else "router" if "router" in name
        else "expert" if "experts" in name
        else "dense"
    )  # fmt: skip
    lr = {"router": settings.lr_router, "expert": settings.lr_expert}.get(role, settings.lr_dense)
    beta2 = {"router": settings.beta2_router, "expert": settings.beta2_expert}.get(role, settings.beta2_dense)
    decay = 0.0 if role in ("norm", "router") else settings.weight_decay
    return torch.optim.AdamW([parameter], lr=lr, betas=(0.9, beta2), eps=settings.eps, weight_decay=decay)


def test_adamw_equals_torch_with_each_groups_rate_beta_and_decay():
    settings, ours, theirs = config(), parameters(), parameters()
    run(ours, settings)
    run_torch(theirs, lambda name, parameter: adamw_like_ours(settings, name, parameter))
    for name, parameter in ours.items():
        # A handful of fp32 roundings a step; updates are of the size of the learning rate, 3e-3.
        torch.testing.assert_close(parameter, theirs[name], rtol=2e-6, atol=2e-7, msg=name)


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"beta2_expert": 0.95}, {"lr_router": 1.1e-3}])
def test_the_comparison_notices_a_wrong_group_setting(wrong):
    ours, theirs = parameters(), parameters()
    run(ours, config(**wrong))
    run_torch(theirs, lambda name, parameter: adamw_like_ours(config(), name, parameter))
    assert any(not torch.allclose(ours[name], theirs[name], rtol=2e-6, atol=2e-7) for name in ours)


def test_muon_equals_torch_muon_matrix_by_matrix():
    """torch.optim.Muon iterates in bf16; ours in fp32 on the CPU, so updates agree to bf16's 2^-8 of their size."""
    settings = config(dense_optimizer="muon", expert_optimizer="muon")
    ours, reference = parameters(), parameters()
    run(ours, settings)
    hidden = {name: p for name, p in reference.items() if "attn.w" in name or "experts" in name}
    for name, parameter in hidden.items():
        lr = settings.lr_expert if "experts" in name else settings.lr_dense
        matrices = [nn.Parameter(m.clone()) for m in parameter.detach().reshape(-1, *parameter.shape[-2:])]
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for step in range(1, STEPS + 1):
            for matrix, grad in zip(matrices, gradients(step)[name].reshape(-1, *parameter.shape[-2:]), strict=True):
                matrix.grad = grad
            muon.step()
        moved = STEPS * lr * 0.2 * max(parameter.shape[-2:]) ** 0.5
        for mine, other in zip(ours[name].reshape(-1, *parameter.shape[-2:]), matrices, strict=True):
            assert (mine - other).abs().max() < 0.02 * moved, name


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_the_muon_comparison_notices_a_wrong_momentum(momentum):
    ours, other = parameters(), parameters()
    run(ours, config(dense_optimizer="muon"))
    run(other, config(dense_optimizer="muon", muon_momentum=momentum))
    name = "layers.0.attn.wq.weight"
    assert (ours[name] - other[name]).abs().max() > 0.02 * STEPS * 3e-3 * 0.2 * 12**0.5


def test_gate_and_up_are_orthogonalised_apart():
    settings = config(expert_optimizer="muon", weight_decay=0.0)
    ours = parameters()
    before = ours["layers.0.ffn.experts.w13"].detach().clone()
    Run(ours, settings).step(gradients(1))
    update = ours["layers.0.ffn.experts.w13"].detach() - before
    for expert in update:
        for matrix in expert:
            values = torch.linalg.svdvals(matrix / (settings.lr_expert * 0.2 * 8**0.5))
            assert values.min() > 0.6
            assert values.max() < 1.3


def test_embedding_head_norms_and_router_stay_on_adamw():
    settings = config(dense_optimizer="muon", expert_optimizer="muon")
    state = state_of(Run(parameters(), settings).optimizer)
    on_muon = {name.removesuffix("/momentum") for name in state if name.endswith("/momentum")}
    assert on_muon == {name for name in shapes() if "attn.w" in name or "experts" in name}
    assert {group_settings(settings, role).kind for role in ("embed", "norm", "router")} == {"adamw"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bf16_weights_move_exactly_as_fp32_masters_do(kind):
    settings = config(dense_optimizer=kind, expert_optimizer=kind)
    rounded = {name: nn.Parameter(p.detach().to(torch.bfloat16)) for name, p in parameters().items()}
    wide = {name: nn.Parameter(p.detach().float()) for name, p in rounded.items()}
    state = state_of(run(rounded, settings))
    run(wide, settings)
    for name, parameter in rounded.items():
        master = join_master(parameter.data, state[f"{name}/residual"])
        assert torch.equal(master, wide[name].data), name


def test_grad_scale_is_a_factor_on_every_gradient():
    scaled, plain = parameters(), parameters()
    settings = config(dense_optimizer="muon")
    Run(scaled, settings).step(gradients(1), grad_scale=torch.tensor(0.5))
    Run(plain, settings).step({name: grad * 0.5 for name, grad in gradients(1).items()})
    assert all(torch.equal(scaled[name], plain[name]) for name in scaled)


def bits(tensors):
    return [tensor.detach().clone().view(torch.uint8) for tensor in tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_without_ok_no_bit_of_weights_and_state_changes(kind, dtype, bad):
    whole = Run(parameters(dtype), config(dense_optimizer=kind, expert_optimizer=kind))
    whole.step(gradients(1), 1)
    before = bits(whole.buffers())
    poisoned = {name: torch.full_like(grad, bad) for name, grad in gradients(2).items()}
    whole.step(poisoned, 2, grad_scale=torch.tensor(bad), ok=NOT_OK)
    assert same(bits(whole.buffers()), before)
    whole.step(gradients(2), 2)
    assert not any(torch.equal(a, b) for a, b in zip(bits(whole.buffers()), before, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_refused_step_leaves_no_trace(kind):
    """Not even in a later update: as if it had never been made."""
    settings = config(dense_optimizer=kind, expert_optimizer=kind)
    twice, once = Run(parameters(torch.bfloat16), settings), Run(parameters(torch.bfloat16), settings)
    twice.step({name: grad * torch.nan for name, grad in gradients(5).items()}, 1, ok=NOT_OK)
    for whole in (twice, once):
        whole.step(gradients(1), 1)
    assert same(bits(twice.buffers()), bits(once.buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_flat_updates_equal_updates_one_by_one(kind, dtype):
    """AdamW bit for bit; Muon but for the order of sums in products of many matrices and of few."""
    settings = config(dense_optimizer=kind, expert_optimizer=kind)
    alone = {}
    for name, parameter in parameters(dtype).items():
        run_of_one = Run({name: parameter}, settings)
        for step in (1, 2):
            run_of_one.step({name: gradients(step)[name]}, step)
        alone |= {name: parameter} | state_of(run_of_one.optimizer)
    together = parameters(dtype)
    whole = Run(together, settings)
    for step in (1, 2):
        whole.step(gradients(step), step)
    found = together | state_of(whole.optimizer)
    assert found.keys() == alone.keys()
    for name, expected in alone.items():
        if kind == "adamw" or name.endswith("/momentum"):
            assert torch.equal(found[name], expected), name
        elif not name.endswith("/residual"):
            torch.testing.assert_close(found[name].float(), expected.float(), rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_padding_stays_zero(kind):
    ours = parameters(torch.bfloat16)
    whole = Run(ours, config(dense_optimizer=kind, expert_optimizer=kind))
    for step in (1, 2, 3):
        whole.step(gradients(step), step)
    inside = sum(p.count_nonzero() for p in ours.values()) + sum(
        tensor.count_nonzero() for tensor in state_of(whole.optimizer).values()
    )
    assert sum(buffer.count_nonzero() for buffer in whole.buffers()) == inside
    assert sum(buffer.numel() for buffer in whole.buffers()) > sum(
        tensor.numel() for tensor in (*ours.values(), *state_of(whole.optimizer).values())
    )


def test_state_has_the_names_shapes_and_dtypes_of_checkpoints():
    ours = parameters(torch.bfloat16)
    ours["layers.0.ffn.router.weight"] = nn.Parameter(torch.randn(4, 8))
    state = state_of(Run(ours, config(expert_optimizer="muon")).optimizer)
    expected = {}
    for name, shape in shapes().items():
        if "router" not in name:
            expected[f"{name}/residual"] = (shape, torch.int16)
        for kind in ("momentum",) if "experts" in name else ("exp_avg", "exp_avg_sq"):
            expected[f"{name}/{kind}"] = (shape, torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected
    assert list(state) == list(expected), "in the parameters' order"
    assert not any(tensor.any() for tensor in state.values())


def test_state_and_weights_are_what_the_update_reads():
    """Restoring copies into them."""
    settings = config(expert_optimizer="muon")
    first, second = Run(parameters(torch.bfloat16), settings), Run(parameters(torch.bfloat16), settings)
    first.step(gradients(1), 1)
    for name, parameter in second.optimizer.flat.parameters.items():
        parameter.data.copy_(first.optimizer.flat.parameters[name])
    for name, tensor in state_of(second.optimizer).items():
        tensor.copy_(state_of(first.optimizer)[name])
    for whole in (first, second):
        whole.step(gradients(2), 2)
    assert same(bits(first.buffers()), bits(second.buffers()))


def test_rates_are_those_of_the_last_set_step():
    whole = Run(parameters(), config(dense_optimizer="muon", expert_optimizer="muon"))
    whole.optimizer.set_step(step=3, lr_factor=0.5)
    rows = [row for group in whole.optimizer._groups for row in group.scalars(whole.optimizer.config, 3, 0.5)]
    assert torch.equal(whole.optimizer._scalars, torch.tensor(rows))
    experts = [row for group in whole.groups if group.key.lr == 2e-3 for row in rows if row[0] == 1 - 1e-3 * 0.1]
    assert experts
    assert all(row[1] == pytest.approx(1e-3 * MUON_RMS * 8**0.5) for row in experts)


def test_muon_takes_equal_matrices_together_in_even_batches(monkeypatch):
    shape_of = {"layers.0.ffn.experts.w13": (5, 2, 8, 16), "layers.1.ffn.experts.w13": (5, 2, 8, 16)}
    shape_of |= {"layers.0.ffn.experts.w2": (5, 16, 8), "layers.1.attn.wq.weight": (3, 5)}
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shape_of.items()}
    settings = config(dense_optimizer="muon", expert_optimizer="muon", lr_expert=3e-3, beta2_expert=0.95)
    (group,) = flatten(ours, settings, alone("cpu")).groups
    assert sorted(batch.shape for batch in muon_batches(group)) == [(1, 3, 5), (5, 16, 8), (20, 8, 16)]

    monkeypatch.setattr(muon, "MUON_BATCH_ELEMENTS", 7 * 8 * 16)
    batches = muon_batches(group)
    assert sorted(batch.shape for batch in batches) == [(1, 3, 5), (5, 16, 8), (6, 8, 16), (7, 8, 16), (7, 8, 16)]
    covered = group.zeros(torch.int32)
    for batch in batches:
        batch.view(covered).add_(1)
    assert all(group.view(covered, name).eq(1).all() for name in ours)
    assert covered.sum() == sum(p.numel() for p in ours.values())

    monkeypatch.setattr(muon, "MUON_BATCH_ELEMENTS", 1)
    assert {batch.shape[0] for batch in muon_batches(group)} == {1}, "one matrix is always taken"


@pytest.mark.parametrize(("size", "each"), [((3, 5), 8), ((3, 6), 4), ((6, 6), 2), ((2, 4), 1)])
def test_batches_start_where_kernels_can_read(size, each, monkeypatch):
    monkeypatch.setattr(muon, "MUON_BATCH_ELEMENTS", 1)
    ours = {"layers.0.ffn.experts.w2": nn.Parameter(torch.randn(19, *size))}
    (group,) = flatten(ours, config(expert_optimizer="muon"), alone("cpu")).groups
    batches = muon_batches(group)
    assert [batch.shape[0] for batch in batches] == [each] * (19 // each) + [19 % each] * (19 % each > 0)
    assert all(batch.start % 8 == 0 for batch in batches)


def test_bounded_batches_change_no_update(monkeypatch):
    """But for the order of a product's sums."""
    settings = config(dense_optimizer="muon", expert_optimizer="muon")
    whole, bounded = parameters(), parameters()
    run(whole, settings)
    monkeypatch.setattr(muon, "MUON_BATCH_ELEMENTS", 100)
    run(bounded, settings)
    for name in whole:
        torch.testing.assert_close(bounded[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, found none")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_captured_update_is_driven_from_device_memory(kind):
    """Replays give the bits of eager updates, whatever the step, the rate and `ok`; copies in flight are not lost."""
    settings = config(dense_optimizer=kind, expert_optimizer=kind)
    runs = []
    for graph in (False, True):
        ours = {name: nn.Parameter(p.data.cuda()) for name, p in parameters(torch.bfloat16).items()}
        flat, ops = flatten(ours, settings, alone("cpu")), select_ops("native", "cuda")
        accumulated, optimizer = Gradients(flat, ops), Optimizer(flat, settings, ops)
        ok = torch.ones((), dtype=torch.int32, device="cuda")
        scale = torch.ones((), device="cuda")

        def update(optimizer=optimizer, accumulated=accumulated, scale=scale, ok=ok):
            optimizer.step(accumulated, grad_scale=scale.div(accumulated.norm()), ok=ok)

        replay = update
        if graph:
            ok.zero_()
            optimizer.set_step(step=1, lr_factor=1.0)
            update()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                update()
            replay = captured.replay
        for step in range(1, STEPS + 1):
            for name, (grad,) in accumulated.parts.items():
                grad.copy_(gradients(step)[name])
            ok.fill_(step != 3)
            optimizer.set_step(step=step, lr_factor=1 / step)
            replay()
        runs.append([group.weight for group in flat.groups] + list(state_of(optimizer).values()))
    assert same(bits(runs[0]), bits(runs[1]))
