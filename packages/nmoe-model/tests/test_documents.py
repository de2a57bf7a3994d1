"""Samples packed of several documents: each has the states, losses and gradients that it has alone.

Alone, a document's positions are those that it has in the sample, or begin at 0: RoPE's scores depend on differences
alone. The first is exact but for float64; the second's tables are fp32, and errors of 1e-7 grow through the blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from nmoe.model.cache import Cache
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer

NAMES = ["everything", "mla", "mla_swa_mtp", "sdpa", "sdpa_swa_mtp"]
NO_BALANCE = {"seq_balance_loss": 0.0, "aux_loss": 0.0}
"""Balance losses are of sequences or micro-batches by definition, whatever documents these have."""
LENGTHS = [5, 3, 9, 4]
"""About the window of 3, and longer than a depth of MTP, which leaves out as many positions of a lone document."""
LENGTH = sum(LENGTHS)
PLACES = [slice(end - n, end) for n, end in zip(LENGTHS, accumulate(LENGTHS), strict=True)]
START_BS = torch.tensor([[place.start for place in PLACES for _ in range(place.start, place.stop)]], dtype=torch.int32)


def moved(late: int) -> torch.Tensor:
    """Documents that start elsewhere (a mistake)."""
    return (START_BS + late).clamp(min=0).minimum(torch.arange(LENGTH)).int()


def sample_of(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(3))


@contextmanager
def positions_from(model: Transformer, first: int) -> Iterator[None]:
    """RoPE's positions begin at `first` instead of 0."""
    right = model.rope.forward
    model.rope.forward = lambda start, length, device: right(start + first, length, device)
    yield
    model.rope.forward = right


def gradients(model: Transformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def added(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_states_and_their_gradients_are_those_of_each_document_alone(tiny, build, name: str, offset: bool) -> None:
    config = tiny(name)
    model, token_BS = build(config), sample_of(config)[:, :-1]
    weight_BSD = torch.randn(1, LENGTH, config.dim, dtype=torch.float64)
    state_BSD = model.hidden(token_BS, document_start_BS=START_BS)
    found, parts = gradients(model, (state_BSD * weight_BSD).sum()), []
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if offset else {"rtol": 1e-4, "atol": 1e-4}
    for place in PLACES:
        with positions_from(model, place.start if offset else 0):
            alone_BSD = model.hidden(token_BS[:, place])
        torch.testing.assert_close(state_BSD[:, place], alone_BSD, **tolerance)
        parts.append(gradients(model, (alone_BSD * weight_BSD[:, place]).sum()))
    assert_close(found, added(parts), **tolerance)


@pytest.mark.parametrize("late", [-1, 1, None])
@pytest.mark.parametrize("name", ["mla", "sdpa", "everything"])
def test_other_starts_and_none_are_told_apart(tiny, build, name: str, late: int | None) -> None:
    config = tiny(name)
    model, token_BS = build(config), sample_of(config)[:, :-1]
    state_BSD = model.hidden(token_BS, document_start_BS=START_BS)
    wrong_BSD = model.hidden(token_BS, document_start_BS=None if late is None else moved(late))
    assert (state_BSD - wrong_BSD).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_no_document_reads_another(tiny, build, name: str) -> None:
    """Other tokens in one change its own states alone, but for the order in which experts' rows are multiplied."""
    config = tiny(name)
    model, token_BS = build(config), sample_of(config)[:, :-1]
    state_BSD = model.hidden(token_BS, document_start_BS=START_BS)
    for changed in PLACES:
        other_BS = token_BS.clone()
        other_BS[:, changed] = (other_BS[:, changed] + 1) % config.vocab_size
        other_BSD = model.hidden(other_BS, document_start_BS=START_BS)
        for place in PLACES:
            difference = float((other_BSD[:, place] - state_BSD[:, place]).detach().abs().max())
            assert difference > 1e-3 if place == changed else difference < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_that_is_one_document_is_as_before(tiny, build, name: str) -> None:
    config = tiny(name, **NO_BALANCE)
    model, sample = build(config), sample_of(config)
    loss = model.training_loss(sample, LENGTH).total
    again = model.training_loss(sample, LENGTH, document_start_BS=torch.zeros_like(START_BS)).total
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    assert_close(gradients(model, again), gradients(model, loss), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_token_loss_is_that_of_each_document_with_the_token_after_it(tiny, build, name: str) -> None:
    """Every token is predicted; a document's first one from the last state of the one before."""
    config = tiny(name, **NO_BALANCE, mtp_depth=0)
    model, sample = build(config), sample_of(config)
    loss = model.training_loss(sample, LENGTH, document_start_BS=START_BS).total
    scored = model.score(sample[:, :-1], sample[:, 1:], document_start_BS=START_BS) / LENGTH
    torch.testing.assert_close(scored, loss, rtol=1e-12, atol=0)
    parts, total = [], torch.zeros((), dtype=torch.float64)
    for place in PLACES:
        with positions_from(model, place.start):
            alone = model.training_loss(sample[:, place.start : place.stop + 1], LENGTH).total
        parts.append(gradients(model, alone))
        total += alone.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-12, atol=0)
    assert_close(gradients(model, loss), added(parts), rtol=1e-9, atol=1e-12)


@contextmanager
def noted_depths(model: Transformer) -> Iterator[list[torch.Tensor]]:
    """What MTP's modules give, in order."""
    noted: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, out: noted.append(out.out_BSD)) for module in model.mtp]
    yield noted
    for hook in hooks:
        hook.remove()


def depths(model: Transformer, sample: torch.Tensor, start_BS: torch.Tensor | None = None) -> list[torch.Tensor]:
    with noted_depths(model) as noted:
        model.training_loss(sample, LENGTH, document_start_BS=start_BS)
    return noted


def mtp_differences(model: Transformer, sample: torch.Tensor) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of packed and lone documents: largest difference of each depth's states, where tokens of one document are all
    that depth k reads (the last k positions of one read the next one's), and those of the gradients of these states."""
    packed, differences = depths(model, sample, START_BS), [0.0] * len(model.mtp)
    loss = total = torch.zeros((), dtype=torch.float64)
    for place in PLACES:
        with positions_from(model, place.start):
            alone = depths(model, sample[:, place.start : place.stop + 1])
        for k, (whole_BSD, part_BSD) in enumerate(zip(packed, alone, strict=True), start=1):
            assert part_BSD.shape[1] == place.stop - place.start - k
            mine_BSD = whole_BSD[:, place.start : place.start + part_BSD.shape[1]]
            weight_BSD = torch.randn(part_BSD.shape, dtype=torch.float64)
            loss, total = loss + (mine_BSD * weight_BSD).sum(), total + (part_BSD * weight_BSD).sum()
            differences[k - 1] = max(differences[k - 1], float((mine_BSD - part_BSD).detach().abs().max()))
    found, expected = gradients(model, loss), gradients(model, total)
    return differences, {name: (found[name] - expected[name]).abs().max() for name in found}


@pytest.mark.parametrize("name", ["everything", "mla_swa_mtp", "sdpa_swa_mtp"])
def test_mtp_gives_what_each_document_gives_alone(tiny, build, name: str) -> None:
    model = build(tiny(name, **NO_BALANCE))
    differences, gradient_differences = mtp_differences(model, sample_of(model.config))
    assert max(differences) < 1e-10
    assert max(gradient_differences.values()) < 1e-9


@pytest.mark.parametrize("mistake", ["none", "of token i + k"])
def test_other_documents_of_mtp_are_told_apart(tiny, build, mistake: str) -> None:
    """None at all, or those of the tokens whose embeddings it reads."""
    model = build(tiny("mla_swa_mtp", **NO_BALANCE, mtp_depth=2))

    def swap(depth: int) -> Callable[..., tuple[object, ...]]:
        def hook(module: object, given: tuple[object, ...]) -> tuple[object, ...]:
            *others, start_BS = given
            if start_BS is None or mistake == "none":
                return *others, None
            moved_BS = (START_BS[:, depth:] - depth).clamp(min=0)
            return *others, moved_BS

        return hook

    for depth, module in enumerate(model.mtp, start=1):
        module.register_forward_pre_hook(swap(depth))
    differences, _ = mtp_differences(model, sample_of(model.config))
    assert min(differences) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_layers_have_the_same_bits(tiny, build, name: str) -> None:
    model = build(tiny(name))
    sample, layers = sample_of(model.config), range(model.config.n_layers + model.config.mtp_depth)
    results = []
    for recompute in ((), layers):
        loss = model.training_loss(sample, LENGTH, document_start_BS=START_BS, recompute=recompute).total
        results.append(gradients(model, loss) | {"loss": loss.detach()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("name", NAMES)
def test_starts_count_what_a_cache_holds(tiny, build, name: str) -> None:
    """Tolerance: MLA's cached products are made in another order."""
    config = tiny(name)
    model, token_BS = build(config).eval(), sample_of(config)[:, :-1]
    expected = model.hidden(token_BS, document_start_BS=START_BS)
    cache = Cache(config.n_layers, LENGTH)
    parts = (slice(0, 7), slice(7, 8), slice(8, LENGTH))
    found = [model.hidden(token_BS[:, part], cache, document_start_BS=START_BS[:, part]) for part in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-9, atol=1e-10)
