"""AdamW and Muon against PyTorch's own, on fp32 weights and on bf16 weights with exact masters."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference.master import join_master
from nmoe.train.optim import Optimizer, group_settings
from nmoe.train.schema import OptimConfig
from torch import nn

STEPS = 8
ONE = torch.tensor(1.0)


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


def run(ours, settings, lr_factor=1.0):
    optimizer = Optimizer(ours, settings, select_ops("reference", "cpu"))
    for step in range(1, STEPS + 1):
        optimizer.step(gradients(step), step=step, lr_factor=lr_factor, grad_scale=ONE)
    return optimizer


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
    run_one = Optimizer(ours, settings, select_ops("reference", "cpu"))
    run_one.step(gradients(1), step=1, lr_factor=1.0, grad_scale=ONE)
    update = ours["layers.0.ffn.experts.w13"].detach() - before
    for expert in update:
        for matrix in expert:
            values = torch.linalg.svdvals(matrix / (settings.lr_expert * 0.2 * 8**0.5))
            assert values.min() > 0.6
            assert values.max() < 1.3


def test_embedding_head_norms_and_router_stay_on_adamw():
    settings = config(dense_optimizer="muon", expert_optimizer="muon")
    optimizer = Optimizer(parameters(), settings, select_ops("reference", "cpu"))
    on_muon = {name for names in optimizer.muon_batches for name in names}
    assert on_muon == {name for name in shapes() if "attn.w" in name or "experts" in name}
    assert {group_settings(settings, role).kind for role in ("embed", "norm", "router")} == {"adamw"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bf16_weights_move_exactly_as_fp32_masters_do(kind):
    settings = config(dense_optimizer=kind, expert_optimizer=kind)
    rounded = {name: nn.Parameter(p.detach().to(torch.bfloat16)) for name, p in parameters().items()}
    wide = {name: nn.Parameter(p.detach().float()) for name, p in rounded.items()}
    state = run(rounded, settings).state
    run(wide, settings)
    for name, parameter in rounded.items():
        master = join_master(parameter.data, state[f"{name}/residual"])
        assert torch.equal(master, wide[name].data), name


def test_grad_scale_is_a_factor_on_every_gradient():
    scaled, plain = parameters(), parameters()
    ops, settings = select_ops("reference", "cpu"), config(dense_optimizer="muon")
    Optimizer(scaled, settings, ops).step(gradients(1), step=1, lr_factor=1.0, grad_scale=torch.tensor(0.5))
    halves = {name: grad * 0.5 for name, grad in gradients(1).items()}
    Optimizer(plain, settings, ops).step(halves, step=1, lr_factor=1.0, grad_scale=ONE)
    assert all(torch.equal(scaled[name], plain[name]) for name in scaled)
