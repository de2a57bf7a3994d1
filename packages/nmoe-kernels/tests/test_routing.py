"""Routing against DeepSeek-V3's equations 12 to 16 written token by token, and the row order against Python's sort."""

import math

import pytest
import torch
from nmoe.kernels.reference.routing import RowIndex, index_rows, route
from torch._subclasses.fake_tensor import FakeTensorMode

GROUPS = [(1, 1), (4, 2), (4, 1), (2, 2), (6, 3)]
"""Groups, and groups that a token may use, of 12 experts."""


def naive_route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    n_groups: int = 1,
    n_limited_groups: int = 1,
    route_scale: float = 1.0,
    *,
    mistake: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and gates in float64. `mistake` names one plausible error to make."""
    n_experts = logits.shape[1]
    size = n_experts // n_groups
    tie = -1 if mistake == "higher id wins" else 1
    experts, gates = [], []
    for row in logits.double().tolist():
        score = [1 / (1 + math.exp(-x)) for x in row]
        biased = [s + b for s, b in zip(score, bias.double().tolist(), strict=True)]
        members = [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
        if mistake == "group by its best":
            merit = [max(biased[e] for e in group) for group in members]
        elif mistake == "group by its sum":
            merit = [sum(biased[e] for e in group) for group in members]
        elif n_groups > 1:
            merit = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
        else:
            merit = [0.0]
        allowed = sorted(range(n_groups), key=lambda g: (-merit[g], tie * g))[:n_limited_groups]
        if mistake == "no groups":
            allowed = list(range(n_groups))
        reach = {e for g in allowed for e in members[g]}
        if mistake == "barred experts score zero":
            rank = [biased[e] if e in reach else 0.0 for e in range(n_experts)]
            chosen = sorted(range(n_experts), key=lambda e: (-rank[e], e))[:top_k]
        else:
            chosen = sorted(reach, key=lambda e: (-biased[e], tie * e))[:top_k]
        if mistake == "unbiased selection":
            chosen = sorted(reach, key=lambda e: (-score[e], e))[:top_k]
        weight = [biased[e] if mistake == "bias in the weights" else score[e] for e in chosen]
        total = 1.0 if mistake == "not normalised" else sum(weight)
        if mistake == "normalised over all":
            total = sum(score)
        scale = 1.0 if mistake == "no route scale" else route_scale
        experts.append(chosen)
        gates.append([w / total * scale for w in weight])
    return torch.tensor(experts), torch.tensor(gates, dtype=torch.float64)


def draw(n_tokens: int = 60, *, tied: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(n_tokens, 12, dtype=torch.float64)
    if tied:
        logits = torch.randint(-1, 2, (n_tokens, 12)).double()
    return logits, torch.randn(12, dtype=torch.float64) * (0 if tied else 0.2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("n_groups", "limit"), GROUPS)
def test_equals_the_equations(n_groups: int, limit: int, tied: bool) -> None:
    logits, bias = draw(tied=tied)
    found = route(logits, bias, top_k=3, n_groups=n_groups, n_limited_groups=limit, route_scale=2.446)
    experts, gates = naive_route(logits, bias, 3, n_groups, limit, 2.446)
    assert torch.equal(found.expert_TK, experts)
    torch.testing.assert_close(found.gate_TK, gates, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("mistake", "n_groups", "limit", "tied"),
    [
        ("higher id wins", 1, 1, True),
        ("higher id wins", 4, 2, True),
        ("unbiased selection", 1, 1, False),
        ("bias in the weights", 1, 1, False),
        ("not normalised", 1, 1, False),
        ("normalised over all", 1, 1, False),
        ("no route scale", 1, 1, False),
        ("no groups", 4, 2, False),
        ("group by its best", 4, 2, False),
        ("group by its sum", 4, 2, False),
    ],
)
def test_the_oracle_tells_mistakes_apart(mistake: str, n_groups: int, limit: int, tied: bool) -> None:
    logits, bias = draw(tied=tied)
    found = route(logits, bias, top_k=3, n_groups=n_groups, n_limited_groups=limit, route_scale=2.446)
    experts, gates = naive_route(logits, bias, 3, n_groups, limit, 2.446, mistake=mistake)
    same = torch.equal(found.expert_TK, experts) and torch.allclose(found.gate_TK, gates, rtol=1e-4)
    assert not same, f"{mistake}: not seen"


def test_barred_groups_stay_barred_where_biased_scores_are_negative() -> None:
    """A mask of zeros, as some code has it, would beat every expert here."""
    logits, _ = draw()
    bias = torch.full((12,), -5.0, dtype=torch.float64)
    found = route(logits, bias, top_k=3, n_groups=4, n_limited_groups=2)
    assert torch.equal(found.expert_TK, naive_route(logits, bias, 3, 4, 2)[0])
    wrong = naive_route(logits, bias, 3, 4, 2, mistake="barred experts score zero")[0]
    assert not torch.equal(found.expert_TK, wrong)


def test_the_bias_moves_choices_and_takes_no_part_in_gates() -> None:
    logits = torch.randn(40, 8)
    bias = torch.zeros(8)
    bias[5] = 100.0
    found = route(logits, bias, top_k=2, route_scale=1.5)
    assert (found.expert_TK[:, 0] == 5).all()
    chosen = logits.sigmoid().gather(1, found.expert_TK)
    torch.testing.assert_close(found.gate_TK, 1.5 * chosen / chosen.sum(1, keepdim=True))
    assert found.gate_TK.dtype == torch.float32
    torch.testing.assert_close(found.gate_TK.sum(1), torch.full((40,), 1.5))


def test_an_even_bias_changes_nothing() -> None:
    logits, _ = draw()
    plain = route(logits, torch.zeros(12), top_k=3)
    lifted = route(logits, torch.full((12,), 0.5), top_k=3)
    assert torch.equal(plain.expert_TK, lifted.expert_TK)
    assert torch.equal(plain.gate_TK, lifted.gate_TK)


def test_gradients_flow_through_scores_alone() -> None:
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    gates = lambda x: route(x, bias, top_k=2, route_scale=2.0).gate_TK  # noqa: E731
    biased = logits.detach().sigmoid().sort(descending=True).values
    assert (biased[:, 1] - biased[:, 2]).min() > 1e-4, "no choice flips within a finite difference"
    assert torch.autograd.gradcheck(gates, (logits,))
    (gates(logits) ** 2).sum().backward()
    assert bias.grad is None


def test_one_expert_a_token_has_the_whole_weight() -> None:
    logits, bias = draw()
    assert torch.equal(route(logits, bias, top_k=1).gate_TK, torch.ones(60, 1, dtype=torch.float64))


def naive_index(expert_TK: torch.Tensor, n_experts: int) -> RowIndex:
    flat = expert_TK.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda r: (flat[r], r))
    row = [order.index(r) for r in range(len(flat))]
    offset = [sum(e < expert for e in flat) for expert in range(n_experts + 1)]
    return RowIndex(
        torch.tensor(order, dtype=torch.int64),
        torch.tensor(row, dtype=torch.int64).view_as(expert_TK),
        torch.tensor(offset, dtype=torch.int32),
    )


def distinct(n_tokens: int, n_experts: int, top_k: int) -> torch.Tensor:
    return torch.rand(n_tokens, n_experts).argsort(1)[:, :top_k]


@pytest.mark.parametrize(
    "expert_TK",
    [
        distinct(50, 7, 3),
        distinct(1, 7, 7),
        distinct(20, 3, 2) * 2 + 1,  # experts 0, 2, 4 and 6 are empty
        torch.full((9, 1), 4),  # all to one
        torch.full((9, 1), 0),
        torch.full((9, 1), 6),
        torch.empty(0, 3, dtype=torch.int64),
    ],
    ids=["ragged", "all_experts", "empty_experts", "all_to_one", "all_to_first", "all_to_last", "no_tokens"],
)
def test_rows_stand_by_expert_then_token_then_slot(expert_TK: torch.Tensor) -> None:
    found, expected = index_rows(expert_TK, 7), naive_index(expert_TK, 7)
    for name in RowIndex._fields:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def test_row_order_survives_many_ties() -> None:
    """Long enough that an unstable sort would show."""
    expert_TK = distinct(5000, 4, 2)
    index = index_rows(expert_TK, 4)
    flat = expert_TK.flatten()
    key = flat[index.order_R] * flat.numel() + index.order_R
    assert (key.diff() > 0).all()
    assert torch.equal(index.order_R[index.row_TK.flatten()], torch.arange(flat.numel()))


def test_nothing_is_read_back_to_the_host() -> None:
    """Fake tensors have shapes and no values: reading one, or a shape that hangs on values, raises."""
    with FakeTensorMode():
        routing = route(torch.empty(16, 12), torch.empty(12), top_k=3, n_groups=4, n_limited_groups=2)
        index = index_rows(routing.expert_TK, 12)
        assert index.offset_E.shape == (13,)
