"""The whole model: its training loss and what that does not depend on, its start, and all gradients by differences."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nmoe.kernels.ops import select_ops
from nmoe.model.feed_forward import MixtureOfExperts
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer, parameter_role
from nmoe.rdep.transport import LocalTransport
from nmoe.rdep.world import World

NAMES = ["everything", "mla", "mla_swa_mtp", "sdpa", "sdpa_swa_mtp"]
NANO = {
    "vocab_size": 257,
    "dim": 128,
    "n_layers": 4,
    "n_heads": 4,
    "init_std": 0.02,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "attn_local": "swa",
    "attn_local_window": 64,
    "attn_global_every": 2,
    "inter_dim": 384,
    "moe_inter_dim": 128,
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "mtp_depth": 1,
}
"""The shape of configs/nano.toml."""


def samples(config: ModelConfig, count: int = 4, length: int = 7) -> torch.Tensor:
    return torch.randint(config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(3))


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_next_token_loss_is_cross_entropy_of_the_logits(tiny, build, name: str) -> None:
    config = tiny(name, mtp_depth=0, seq_balance_loss=0.0, aux_loss=0.0)
    model, sample = build(config), samples(config)
    loss = model.training_loss(sample, 28)
    expected = F.cross_entropy(model.logits(sample[:, :-1]).flatten(0, 1), sample[:, 1:].flatten())
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.next_token, expected.detach(), rtol=1e-12, atol=0)
    assert not loss.next_token.requires_grad
    shifted = F.cross_entropy(model.logits(sample[:, :-1]).flatten(0, 1), sample[:, :-1].flatten())
    assert (loss.total - shifted).abs() > 1e-2, "targets one early are told apart"


def test_next_token_loss_leaves_the_other_losses_out(tiny, build) -> None:
    config = tiny()
    model, sample = build(config), samples(config)
    loss = model.training_loss(sample, 28)
    plain = F.cross_entropy(model.logits(sample[:, :-1]).flatten(0, 1), sample[:, 1:].flatten())
    torch.testing.assert_close(loss.next_token, plain.detach(), rtol=1e-12, atol=0)
    assert loss.total > loss.next_token + 0.1


def test_score_sums_over_valid_targets(tiny, build) -> None:
    config = tiny()
    model, sample = build(config).eval(), samples(config)
    target = sample[:, 1:].clone()
    target[0, :3], target[2, 6] = -100, -100
    found = model.score(sample[:, :-1], target)
    expected = F.cross_entropy(model.logits(sample[:, :-1]).flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [(2, 2), (1, 3), (1, 1, 1, 1)])
def test_micro_batches_add_up_to_the_batch(tiny, build, name: str, parts: tuple[int, ...]) -> None:
    """Values, gradients and loads; the Switch-style loss is of a micro-batch by definition, and is off."""
    config = tiny(name, aux_loss=0.0)
    model, sample = build(config), samples(config)
    whole = model.training_loss(sample, 28)
    whole.total.backward()
    expected, loads = gradients(model), [router.load.clone() for _, router in model.routers()]
    model.zero_grad()
    for _, router in model.routers():
        router.load.zero_()
    total = next_token = 0.0
    for part in sample.split(parts):
        loss = model.training_loss(part, 28)
        loss.total.backward()
        total, next_token = total + loss.total.detach(), next_token + loss.next_token
    torch.testing.assert_close(total, whole.total.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(next_token, whole.next_token, rtol=1e-12, atol=0)
    for parameter_name, grad in gradients(model).items():
        torch.testing.assert_close(
            grad, expected[parameter_name], rtol=1e-9, atol=1e-12, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )
    assert all(torch.equal(router.load, load) for (_, router), load in zip(model.routers(), loads, strict=True))


def test_a_mean_of_means_would_be_told_apart(tiny, build) -> None:
    """Unequal micro-batches, each divided by its own count: the plausible mistake."""
    config = tiny(aux_loss=0.0)
    model, sample = build(config), samples(config)
    wrong = sum(model.training_loss(part, part.shape[0] * 7).total / 2 for part in sample.split((1, 3)))
    assert (wrong - model.training_loss(sample, 28).total).abs() > 1e-4


def test_balance_losses_are_means_over_sequences(tiny, build) -> None:
    """What they add is their mean over the batch's sequences, summed over layers and MTP modules."""
    config = tiny(seq_balance_loss=0.2, aux_loss=0.1)
    model, sample = build(config), samples(config)
    balances: list[float] = []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.register_forward_hook(lambda module, args, out: balances.append(float(out.balance.detach())))
    with_balance = model.training_loss(sample, 28).total
    assert len(balances) == 3 + 2
    plain = Transformer.build(
        config.model_copy(update={"seq_balance_loss": 0.0, "aux_loss": 0.0}),
        select_ops("reference", "cpu"),
        LocalTransport(),
        device="cpu",
        dtype=torch.float64,
    )
    plain.load_state_dict(model.state_dict())
    added = float((with_balance - plain.training_loss(sample, 28).total).detach())
    assert added == pytest.approx(sum(balances) / 4, rel=1e-9)
    assert added > 0.3 * 5, "each is at least about its weight"


def mixtures(model: Transformer) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@contextmanager
def noted_choices(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """Experts by biased score and by score alone, of every mixture that runs."""
    noted: list[torch.Tensor] = []

    def note(right, logits_TE, *args, **options):
        routing = right(logits_TE, *args, **options)
        noted.extend((routing.expert_TK, logits_TE.topk(routing.expert_TK.shape[1]).indices))
        return routing

    kept = [(mixture, mixture.ops) for mixture in mixtures(model)]
    for mixture, ops in kept:
        mixture.ops = replace(ops, route=partial(note, ops.route))
    yield noted
    for mixture, ops in kept:
        mixture.ops = ops


def directional_errors(model: Transformer, sample: torch.Tensor, step: float = 1e-5) -> dict[str, float]:
    """For each parameter: backward's slope along a random direction against that of central differences, over the
    gradient's norm. A step that flips a choice of experts is refused, since the loss jumps there."""
    with noted_choices(model) as choices:
        model.training_loss(sample, sample.shape[0] * (sample.shape[1] - 1)).total.backward()
    grads, errors = gradients(model), {}
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad(), noted_choices(model) as moved:
                parameter.add_(direction, alpha=sign * step)
                ends.append(model.training_loss(sample, sample.shape[0] * (sample.shape[1] - 1)).total)
                parameter.sub_(direction, alpha=sign * step)
            assert all(torch.equal(a, b) for a, b in zip(choices, moved, strict=True)), f"{name}: a choice flipped"
        slope = float(ends[0] - ends[1]) / (2 * step)
        grad = grads.get(name, torch.zeros_like(parameter))
        errors[name] = abs(slope - float((grad * direction).sum())) / max(float(grad.norm()), 1e-6)
    return errors


@pytest.mark.parametrize("name", ["everything", "sdpa_swa_mtp"])
def test_all_gradients_by_finite_differences(tiny, build, name: str) -> None:
    """MLA with q LoRA or plain attention, windows, groups, experts, shared experts, MTP and balance losses at once.

    Central differences of 1e-5 err by about 1e-10 in the third derivative and 1e-11 in rounding, beside norms ≥ 1e-4.
    """
    config = tiny(name, init_std=0.4)
    errors = directional_errors(build(config), samples(config, count=2))
    assert max(errors.values()) < 1e-5, errors


def test_finite_differences_tell_a_lost_gradient_apart(tiny, build) -> None:
    """Gates without gradient; the balance losses still reach the router, so only its size is wrong."""
    config = tiny(init_std=0.4)
    model = build(config)

    def detached(right, *args, **options):
        routing = right(*args, **options)
        return routing._replace(gate_TK=routing.gate_TK.detach())

    for mixture in mixtures(model):
        mixture.ops = replace(mixture.ops, route=partial(detached, mixture.ops.route))
    errors = directional_errors(model, samples(config, count=2))
    assert errors["layers.1.ffn.router.weight"] > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_never_reach_earlier_logits(tiny, build, name: str) -> None:
    config = tiny(name)
    model, sample = build(config).eval(), samples(config, count=1, length=10)
    logits = model.logits(sample)
    changed = sample.clone()
    changed[0, 6] = (changed[0, 6] + 1) % config.vocab_size
    difference = (model.logits(changed) - logits).abs().amax(dim=(0, 2))
    # Not bit for bit: an expert's product over more rows may sum in another order.
    assert difference[:6].max() < 1e-12
    assert difference[6:].min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_follow_float64(tiny, build, dtype: torch.dtype) -> None:
    """Same weights; the loss, a mean over 28 tokens, errs by far less than single roundings through four layers."""
    config = tiny("mla_swa_mtp", init_std=0.1)
    narrow, sample = build(config, dtype=dtype), samples(config)
    wide = build(config)
    wide.load_state_dict({name: tensor.double() for name, tensor in narrow.state_dict().items()})
    found, expected = (m.training_loss(sample, 28).total.detach().double() for m in (narrow, wide))
    torch.testing.assert_close(found, expected, rtol=3e-6 if dtype == torch.float32 else 1e-2, atol=0)
    dtypes = {parameter_role(name): p.dtype for name, p in narrow.named_parameters()}
    assert dtypes == {"embed": dtype, "norm": dtype, "dense": dtype, "expert": dtype, "router": torch.float32}


def build_plain(config: ModelConfig, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    ops = select_ops("reference", "cpu")
    return Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=dtype, seed=seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_first_loss_is_that_of_knowing_nothing(seed: int) -> None:
    config = ModelConfig(**NANO)
    model = build_plain(config, seed)
    sample = torch.randint(257, (4, 129), generator=torch.Generator().manual_seed(seed))
    assert float(model.training_loss(sample, 4 * 128).next_token) == pytest.approx(math.log(257), rel=0.02)


def test_the_seed_decides_the_start(tiny) -> None:
    first, again, other = (build_plain(tiny(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in matrices}) == len(matrices), "no stream twice"


def test_a_layer_starts_the_same_whatever_is_around_it(tiny) -> None:
    small = build_plain(tiny(n_layers=3, mtp_depth=1)).state_dict()
    large = build_plain(tiny(n_layers=5, mtp_depth=2)).state_dict()
    assert set(small) < set(large)
    assert all(torch.equal(small[name], large[name]) for name in small)


class OneOfRanks(LocalTransport):
    """Of several ranks one that is alone: its experts are built, and never called."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(World(rank, size, torch.device("cpu")))

    def n_local(self, n_experts: int) -> int:
        return n_experts // self.world.size


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_share_the_experts_of_one_start(tiny, size: int, dtype: torch.dtype) -> None:
    """Every element of every expert is on one rank, at its place in the whole; all else is on all."""
    config, ops = tiny(), select_ops("reference", "cpu")
    whole = build_plain(config, dtype=dtype).state()
    places = {name: torch.zeros(tensor.numel(), dtype=torch.int32) for name, tensor in whole.items()}
    for rank in range(size):
        model = Transformer.build(config, ops, OneOfRanks(rank, size), device="cpu", dtype=dtype, seed=0)
        assert [piece.name for piece in model.pieces()] == list(whole)
        for piece in model.pieces():
            assert piece.shape == whole[piece.name].shape
            assert torch.equal(whole[piece.name].flatten()[piece.start : piece.stop], piece.tensor.flatten()), (
                piece.name
            )
            places[piece.name][piece.start : piece.stop] += 1
    for name, count in places.items():
        assert (count == (1 if ".experts." in name else size)).all(), name


def test_matrices_are_normal_and_norms_are_one() -> None:
    model = build_plain(ModelConfig(**NANO))
    for name, parameter in model.named_parameters():
        if parameter_role(name) == "norm":
            assert (parameter == 1).all(), name
            continue
        values, n = parameter.detach(), parameter.numel()
        # Five standard errors of the mean and of the standard deviation.
        assert abs(float(values.mean())) < 5 * 0.02 / n**0.5, name
        assert float(values.std()) == pytest.approx(0.02, rel=5 / (2 * n) ** 0.5), name


def test_building_leaves_the_process_as_it_was(tiny) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    build_plain(tiny(), dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_roles(tiny) -> None:
    names = [name for name, _ in build_plain(tiny()).named_parameters()]
    by_role = {role: {n for n in names if parameter_role(n) == role} for role in ("embed", "norm", "router", "expert")}
    assert by_role["embed"] == {"embed.weight", "head.weight"}
    assert by_role["norm"] == {n for n in names if "norm" in n}
    assert by_role["router"] == {n for n in names if n.endswith("router.weight")}
    assert by_role["expert"] == {n for n in names if ".experts.w" in n}
    dense = {n for n in names if parameter_role(n) == "dense"}
    assert "layers.0.ffn.w13" in dense
    assert "layers.1.ffn.shared.w2" in dense
    assert "mtp.0.proj.weight" in dense


def test_state_is_parameters_and_selection_biases(tiny) -> None:
    model = build_plain(tiny())
    state, parameters = model.state(), dict(model.named_parameters())
    biases = set(state) - set(parameters)
    assert set(parameters) <= set(state)
    assert biases == {f"{block}.ffn.router.bias" for block, _ in model.routers()}
    assert [block for block, _ in model.routers()] == [
        "layers.1",
        "layers.2",
        "layers.3",
        "mtp.0.block",
        "mtp.1.block",
    ]
