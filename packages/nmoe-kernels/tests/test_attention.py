"""Causal, windowed and cached attention, in documents and whole samples, against a naive softmax over the visible keys,
in float64."""

import math
from itertools import accumulate

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.attention import attention, blockwise_window_attention

CASES = [  # queries, keys, window
    (1, 1, None),
    (7, 7, None),
    (12, 12, 4),  # blockwise, whole blocks
    (13, 13, 4),  # blockwise, the last block cut short
    (13, 13, 6),
    (13, 13, 1),  # only itself
    (16, 16, 8),  # the longest window that goes by blocks
    (13, 13, 8),  # masked
    (13, 13, 12),
    (13, 13, 13),  # the window holds all
    (13, 13, 100),
    (1, 9, None),  # decoding
    (3, 9, None),
    (1, 9, 2),
    (3, 9, 4),
    (3, 9, 100),
]
WIDTHS = [(6, 6), (6, 4), (4, 7)]  # query-key, value
SCALE = 0.37


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    shift: int = 0,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query at a time; `shift` moves the queries against the keys (a mistake)."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = k.shape[2] - q.shape[2] + i + shift
                first = 0 if window is None else max(0, position - window + 1)
                if start is not None:
                    first = max(first, int(start[b, i]))
                visible = range(first, min(position + 1, k.shape[2]))
                score = [math.exp(scale * float(q[b, h, i] @ k[b, h, j])) for j in visible]
                for j, weight in zip(visible, score, strict=True):
                    out[b, h, i] += weight / sum(score) * v[b, h, j]
    return out


def draw(queries: int, keys: int, widths: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    width, value = widths
    return [
        torch.randn(2, 2, n, w, dtype=torch.float64).to(dtype)
        for n, w in ((queries, width), (keys, width), (keys, value))
    ]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("queries", "keys", "window"), CASES)
def test_equals_naive_softmax(queries: int, keys: int, window: int | None, widths: tuple[int, int]) -> None:
    q, k, v = draw(queries, keys, widths)
    found = attention(q, k, v, scale=SCALE, window=window)
    torch.testing.assert_close(found, naive(q, k, v, SCALE, window), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("queries", "keys", "window"), [(13, 13, None), (13, 13, 4), (13, 13, 8), (3, 9, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes(queries: int, keys: int, window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    """Tolerances: some roundings (2^-24, 2^-8) of values of up to 4, for the probabilities and for the output."""
    q, k, v = draw(queries, keys, (6, 4), dtype)
    found = attention(q, k, v, scale=SCALE, window=window)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), naive(q, k, v, SCALE, window), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("queries", "keys", "window", "mistake"),
    [
        (13, 13, 4, {"window": 3}),
        (13, 13, 4, {"window": 5}),
        (13, 13, 8, {"window": 9}),
        (3, 9, 4, {"window": 5}),
        (13, 13, None, {"window": 12}),
        (13, 13, None, {"shift": 1}),  # sees the next token
        (3, 9, None, {"shift": -6}),  # queries aligned to the first keys instead of the last
        (13, 13, None, {"scale": 6**-0.5}),
        (13, 13, None, {"scale": 4**-0.5}),
    ],
)
def test_the_oracle_tells_mistakes_apart(
    queries: int, keys: int, window: int | None, mistake: dict[str, float]
) -> None:
    q, k, v = draw(queries, keys, (6, 4))
    found = attention(q, k, v, scale=SCALE, window=window)
    wrong = naive(q, k, v, **({"scale": SCALE, "window": window} | mistake))
    assert (found - wrong).abs().max() > 1e-3


IN_DOCUMENTS = [case for case in CASES if case[0] > 1]


def places_of(lengths: list[int]) -> list[slice]:
    """Positions of documents that follow each other."""
    return [slice(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)]


def starts_of(*lengths_B: list[int]) -> torch.Tensor:
    """int32 (B, S): at each position the first of its document."""
    rows = [[place.start for place in places_of(row) for _ in range(place.start, place.stop)] for row in lengths_B]
    return torch.tensor(rows, dtype=torch.int32)


def two_packings(queries: int, keys: int) -> torch.Tensor:
    """Of two samples of `keys` positions, of the last `queries`: one position alone first and last, and some."""
    first, second = [1, 3, keys - 5, 1], [keys // 2, keys - keys // 2]
    return starts_of(first, second)[:, keys - queries :]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("queries", "keys", "window"), IN_DOCUMENTS)
def test_equals_naive_softmax_in_documents(
    queries: int, keys: int, window: int | None, widths: tuple[int, int]
) -> None:
    q, k, v = draw(queries, keys, widths)
    start = two_packings(queries, keys)
    found = attention(q, k, v, scale=SCALE, window=window, document_start_BS=start)
    torch.testing.assert_close(found, naive(q, k, v, SCALE, window, start=start), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("late", [-1, 1])
@pytest.mark.parametrize(("queries", "keys", "window"), [(13, 13, None), (13, 13, 4), (13, 13, 8), (3, 9, None)])
def test_the_oracle_tells_other_starts_apart(queries: int, keys: int, window: int | None, late: int) -> None:
    q, k, v = draw(queries, keys, (6, 4))
    start = two_packings(queries, keys)
    found = attention(q, k, v, scale=SCALE, window=window, document_start_BS=start)
    moved = (start + late).clamp(min=0).minimum(torch.arange(keys - queries, keys))
    assert (found - naive(q, k, v, SCALE, window, start=moved)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 1, 4, 8])
@pytest.mark.parametrize("lengths", [[13], [1] * 13, [5, 1, 7], [12, 1], [1, 12], [4, 4, 4, 1]])
def test_a_document_has_what_it_has_alone(lengths: list[int], window: int | None) -> None:
    """Output and gradients."""
    packed = [x[:1].clone().requires_grad_() for x in draw(13, 13, (6, 4))]
    out = attention(*packed, scale=SCALE, window=window, document_start_BS=starts_of(lengths))
    dout = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, packed, dout)]
    for place in places_of(lengths):
        alone = [x.detach()[:, :, place].requires_grad_() for x in packed]
        out = attention(*alone, scale=SCALE, window=window)
        expected = [out, *torch.autograd.grad(out, alone, dout[:, :, place])]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[:, :, place], b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("window", [None, 3, 5])
def test_gradients_in_documents_by_finite_differences(window: int | None) -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in draw(7, 7, (4, 2)))
    options = {"scale": SCALE, "window": window, "document_start_BS": starts_of([1, 4, 2])}
    assert torch.autograd.gradcheck(lambda *a: attention(*a, **options), (q, k, v))


@pytest.mark.parametrize("window", [None, 3, 5])
def test_gradients_by_finite_differences(window: int | None) -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in draw(7, 7, (4, 2)))
    assert torch.autograd.gradcheck(lambda *a: attention(*a, scale=SCALE, window=window), (q, k, v))


@pytest.mark.parametrize("window", [None, 4, 8])
def test_only_visible_keys_matter(window: int | None) -> None:
    """Poison at key 5: bits change exactly for the queries that may see it."""
    q, k, v = draw(13, 13, (6, 4))
    clean = attention(q, k, v, scale=SCALE, window=window)
    k[:, :, 5] += 3.0
    v[:, :, 5] += 3.0
    changed = (attention(q, k, v, scale=SCALE, window=window) - clean).abs().amax(dim=(0, 1, 3)) > 1e-9
    last = 13 if window is None else 5 + window
    assert changed.tolist() == [5 <= i < last for i in range(13)]


def test_a_window_never_costs_the_square_of_the_sequence(allocations) -> None:
    q, k, v = (torch.randn(1, 1, 512, 4) for _ in range(3))
    start = torch.zeros(1, 512, dtype=torch.int32)
    with allocations:
        blockwise_window_attention(q, k, v, scale=SCALE, window=8)
        attention(q, k, v, scale=SCALE, window=8, document_start_BS=start)
    assert allocations.largest <= 512 * 2 * 8, "scores of a block against itself and the one before, no more"


@pytest.mark.parametrize(
    ("q", "k", "v", "window"),
    [
        ((1, 2, 4, 6), (1, 2, 4, 5), (1, 2, 4, 5), None),
        ((1, 2, 4, 6), (1, 1, 4, 6), (1, 1, 4, 6), None),
        ((1, 2, 4, 6), (1, 2, 4, 6), (1, 2, 3, 6), None),
        ((1, 2, 5, 6), (1, 2, 4, 6), (1, 2, 4, 6), None),
        ((1, 2, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6), 0),
        ((2, 4, 6), (2, 4, 6), (2, 4, 6), None),
    ],
    ids=["width", "heads", "values", "more_queries", "empty_window", "rank"],
)
def test_refuses_what_does_not_belong_together(q, k, v, window: int | None) -> None:
    with pytest.raises(ShapeError, match=r"expected .* found"):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), scale=1.0, window=window)


@pytest.mark.parametrize(
    "start",
    [
        torch.zeros(2, 5, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(2, 4, dtype=torch.int32, device="meta"),
    ],
    ids=["length", "rank", "dtype", "device"],
)
def test_refuses_starts_of_other_queries(start: torch.Tensor) -> None:
    q = torch.zeros(2, 1, 4, 6)
    with pytest.raises(ShapeError, match=r"expected document starts .* found"):
        attention(q, q, q, scale=1.0, document_start_BS=start)
