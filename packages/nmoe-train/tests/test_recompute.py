"""Layers that are computed again: what that saves, as predicted and as PyTorch has it; its cost; which are enough."""

import gc
import itertools

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.model.count import count_parameters, flops_per_token
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport
from nmoe.train.memory import predict_memory, saved_by_recomputing
from nmoe.train.recompute import enough_layers, forward_flops, recompute_share, with_recomputed
from nmoe.train.schema import TrainingConfig
from pydantic import ValidationError
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Not half of the sequence or less: the reference tier would copy its keys.
SWA = {"attn_local": "swa", "attn_global_every": 2, "attn_local_window": 96}
SDPA = {"attn": "sdpa", "head_dim": 16, "kv_lora_rank": None, "qk_nope_head_dim": None, "qk_rope_head_dim": None,
        "v_head_dim": None}  # fmt: skip


def config(recompute=(), **model):
    shape = {
        "vocab_size": 500, "dim": 64, "n_layers": 4, "n_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "inter_dim": 96, "moe_inter_dim": 32, "n_routed_experts": 8,
        "n_activated_experts": 2, "n_shared_experts": 1, "mtp_depth": 1,
    }  # fmt: skip
    return TrainingConfig.model_validate(
        {
            "model": {**shape, **model},
            "train": {
                "steps": 1, "batch_size": 4, "micro_batch_size": 4, "seq_len": 128, "recompute_layers": recompute
            },
            "optim": {"lr_dense": 1e-3, "lr_router": 1e-3, "lr_expert": 1e-3},
            "schedule": {"hold_tokens": 0},
            "runtime": {"device": "cpu", "precision": "fp32", "kernels": "reference"},
        }
    )  # fmt: skip


def build(settings):
    ops = select_ops("reference", "cpu")
    return Transformer.build(settings.model, ops, LocalTransport(), device="cpu", dtype=torch.float32, seed=0)


def samples(settings):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(settings.model.vocab_size, (4, settings.train.seq_len + 1), generator=generator)


# The key


def test_layers_are_named_one_by_one_or_all_at_once():
    assert config().recomputed_layers == ()
    assert config([3, 0]).recomputed_layers == (0, 3)
    assert config("all").recomputed_layers == (0, 1, 2, 3, 4)
    assert config("all", mtp_depth=0).recomputed_layers == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([5], "found 5:"),
        ([0, 1, 1], "found 1 more than once:"),
        ([7, 2, 7, 2], "found 7 and 2 more than once and 7 more than once:"),
        ([-1], "found [-1]"),
        ([True], "found [True]"),
        ([1.0], "found [1.0]"),
        ("none", "found 'none'"),
        (2, "found 2"),
    ],
)
def test_other_layers_are_refused_in_one_sentence(layers, found):
    with pytest.raises(ValidationError) as caught:
        config(layers)
    (problem,) = caught.value.errors()
    assert found in problem["msg"]
    assert "expected" in problem["msg"]


# What it saves


class Living(TorchDispatchMode):
    """Bytes of the storages that operators made while it was on, and that are still there; and the most there were."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in taken:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.nbytes())
        return out

    def nbytes(self):
        self.made = {address: made for address, made in self.made.items() if not made[0].expired()}
        return sum(size for _, size in self.made.values())


def kept(settings):
    model = build(settings)
    with Living() as living:
        loss = model.training_loss(samples(settings), 512, recompute=settings.recomputed_layers)
    assert loss.total.requires_grad
    return living.nbytes()


@pytest.mark.parametrize("shape", [{}, SWA, SDPA, {"n_dense_layers": 4}], ids=["mla", "swa", "sdpa", "dense"])
def test_what_each_layer_saves_is_predicted_within_a_quarter(shape):
    without = config(**shape)
    before = kept(without)
    for layer in range(5):
        with_it = config([layer], **shape)
        saved = before - kept(with_it)
        assert saved_by_recomputing(with_it, layer) == pytest.approx(saved, rel=0.25), f"layer {layer}"
        predicted = predict_memory(without).activations - predict_memory(with_it).activations
        assert predicted == saved_by_recomputing(with_it, layer)
    assert predict_memory(config("all", **shape)).activations == pytest.approx(kept(config("all", **shape)), rel=0.25)


@pytest.mark.parametrize(
    "shape", [{}, {"vocab_size": 8}, {"mtp_depth": 0, "vocab_size": 8}], ids=["head", "mtp", "trunk"]
)
@pytest.mark.parametrize("chosen", [(), "all", (1, 3), (0,), (3,)], ids=str)
def test_the_most_at_once_is_predicted_within_a_quarter(chosen, shape):
    """Of forward and backward; and nothing is left after it that a garbage collector would have to find."""
    settings = config(chosen, **shape)
    model = build(settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    gc.disable()
    try:
        with Living() as living:
            loss = model.training_loss(samples(settings), 512, recompute=settings.recomputed_layers)
            loss.total.backward()
        left = living.nbytes()
    finally:
        gc.enable()
    need = predict_memory(settings)
    assert need.activations + need.workspace == pytest.approx(living.most, rel=0.25)
    assert left < 0.01 * living.most


def test_state_is_what_it_was():
    before, after = predict_memory(config()), predict_memory(config("all"))
    assert (before.parameters, before.gradients, before.optimizer) == (
        after.parameters,
        after.gradients,
        after.optimizer,
    )


def test_the_backward_of_a_recomputed_layer_needs_room_that_those_behind_it_have_freed():
    """A head of few ids, so that the most at once is in a layer's backward."""
    small = {"vocab_size": 8, "mtp_depth": 0}
    none, last, first = (predict_memory(config(chosen, **small)) for chosen in ((), [3], [0]))
    saved = saved_by_recomputing(config(**small), 3)
    assert last.activations == none.activations - saved
    assert last.workspace == none.workspace + saved, "the last layer is whole again when most is kept: nothing is won"
    assert first.workspace == none.workspace, "the first one's turn comes when the others' are gone"
    every = predict_memory(config("all", **small))
    assert every.total < first.total < none.total == last.total
    assert every.workspace == none.workspace + saved


# What it costs


@pytest.mark.parametrize("shape", [{}, SWA, SDPA], ids=["mla", "swa", "sdpa"])
def test_layers_and_head_are_the_models_flops(shape):
    settings = config(**shape)
    model, length = settings.model, settings.train.seq_len
    layers = sum(forward_flops(model, layer, length) for layer in range(model.n_layers))
    head = 2 * (model.vocab_size * model.dim + model.dim)  # with the last norm, as `flops_per_token` counts
    assert 3 * (layers + head) == pytest.approx(flops_per_token(model, length), rel=1e-12)


def test_an_mtp_module_costs_its_projection_and_norms_too():
    model = config().model
    more = forward_flops(model, 4, 128) - forward_flops(model, 3, 128)
    assert more == 2 * (2 * model.dim * model.dim + 3 * model.dim)


def test_cost_is_a_share_of_the_models_flops_which_stay():
    settings = config("all")
    again = sum(forward_flops(settings.model, layer, 128) for layer in range(5))
    assert recompute_share(settings) == pytest.approx(again / flops_per_token(settings.model, 128))
    assert recompute_share(config()) == 0
    alone = config("all", mtp_depth=0)
    assert recompute_share(alone) < 1 / 3, "a forward is a third of a step, and the head's is not done again"
    assert count_parameters(settings.model) == count_parameters(config().model)


# Which are enough


def test_enough_layers_fit_and_not_one_could_be_left_out():
    settings = config(vocab_size=8)
    most, least = (predict_memory(config(chosen, vocab_size=8)).total for chosen in ((), "all"))
    counts = []
    for limit in range(least, most + 1, (most - least) // 16):
        layers = enough_layers(settings, limit)
        assert predict_memory(with_recomputed(settings, layers)).total <= limit
        for fewer in itertools.combinations(layers, max(0, len(layers) - 1)):
            assert not layers or predict_memory(with_recomputed(settings, fewer)).total > limit
        counts.append(len(layers))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 3
    assert enough_layers(settings, most) == ()
    assert enough_layers(settings, least - 1) is None


def test_what_is_recomputed_already_does_not_matter():
    limit = (predict_memory(config()).total + predict_memory(config("all")).total) // 2
    assert enough_layers(config(), limit) == enough_layers(config([4]), limit) == enough_layers(config("all"), limit)


def test_the_layer_that_saves_most_a_flop_comes_first():
    """A wide dense MLP keeps three of its widths, and computes on all of them; attention keeps much for few FLOPs."""
    settings = config(inter_dim=4096, vocab_size=8, mtp_depth=0)
    rates = [saved_by_recomputing(settings, i) / forward_flops(settings.model, i, 128) for i in range(4)]
    assert rates[0] < rates[1], "experts: more of what is kept is not the width of a product"
    assert enough_layers(settings, predict_memory(settings).total - 1) == (1,)


# The gradients that the trainer sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_accumulators_get_the_same_bits(dtype):
    settings = config("all")
    found = []
    for recompute in ((), settings.recomputed_layers):
        ops = select_ops("reference", "cpu")
        model = Transformer.build(settings.model, ops, LocalTransport(), device="cpu", dtype=dtype, seed=0)
        for parameter in model.parameters():
            parameter.main_grad = torch.full(parameter.shape, float("nan"))
            parameter.main_grad_stale = True
        for micro_batch in samples(settings).split(2):
            model.training_loss(micro_batch, 512, recompute=recompute).total.backward()
        found.append({name: p.main_grad if p.grad is None else p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(grad.any() and grad.isfinite().all() for grad in found[0].values())
