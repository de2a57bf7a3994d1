"""Routing in CUDA: refusals and shapes without a GPU; values against the reference on one (`-m gpu`)."""

from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference import routing as reference
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import routing_cuda
from nmoe.kernels.native.routing_cuda import (
    BLOCK_ROWS,
    CHUNKS,
    MAX_EXPERTS,
    SCHEDULE_HEAD,
    SOURCES,
    RowIndex,
    index_rows,
    max_row_blocks,
    route,
)
from nmoe.kernels.runtime.launch import CudaKernel

ULP = 2.0**-23
"""Of fp32, relative."""


# --- without a GPU ---------------------------------------------------------------------------------------------------


def test_kernels_have_names_of_their_own() -> None:
    assert len({source.name for source in SOURCES}) == len(SOURCES)


@pytest.mark.parametrize("n_experts", range(1, 6))
def test_row_blocks_bound_is_attained_and_never_passed(n_experts: int) -> None:
    """All sizes of experts that differ in their number of blocks, or by one row from ones that do."""
    sizes = (0, 1, 2, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 1)
    most: dict[int, int] = {}
    for rows in product(sizes, repeat=n_experts):
        blocks = sum(-(-n // BLOCK_ROWS) for n in rows)
        most[sum(rows)] = max(most.get(sum(rows), 0), blocks)
        assert blocks <= max_row_blocks(sum(rows), n_experts)
    full = n_experts * (BLOCK_ROWS + 1)
    assert most[full] == max_row_blocks(full, n_experts)
    assert most[1] == max_row_blocks(1, n_experts) == 1
    assert max_row_blocks(0, n_experts) == 0


def test_every_number_of_experts_has_room_in_shared_memory() -> None:
    """With as many rows at a time as there may be; of 227 KiB, 1 is left to what the order's kernel has itself."""
    for n_experts in range(1, MAX_EXPERTS + 1):
        limit, shared_bytes = routing_cuda._order_room((1 << 30) - 1, n_experts, 1)
        warps = routing_cuda._ORDER_WARPS[limit]
        assert n_experts <= limit
        assert 4 * warps * (n_experts + 2 * 32 * routing_cuda._TURNS) < shared_bytes <= 226 << 10
        tokens = routing_cuda._backward_tokens(n_experts)
        assert tokens % 4 == 0
        assert 4 <= tokens <= 32
        assert 4 * tokens * n_experts <= 64 << 10
    assert [routing_cuda._backward_tokens(n) for n in (64, 256, 512)] == [32, 32, 16]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_no_register_is_spilled(arch: str, ahead: Any) -> None:
    for source in SOURCES:
        assert not ahead.cuda.get(source, arch).resources.spills, source.name


def test_fake_shapes() -> None:
    with FakeTensorMode():
        logits = torch.empty(300, 12, device="cuda", requires_grad=True)
        routing = route(logits, torch.empty(12, device="cuda"), top_k=3)
        index = index_rows(routing.expert_TK, 12, routing.histogram_BE)
        dlogits = torch.ops.nmoe.route_backward(routing.gate_TK, routing.expert_TK, routing.gate_TK, 12, 1.0)
    assert routing.expert_TK.shape == routing.gate_TK.shape == index.row_TK.shape == (300, 3)
    assert routing.gate_TK.requires_grad
    assert not routing.expert_TK.requires_grad
    assert routing.histogram_BE is not None
    assert routing.histogram_BE.shape == (CHUNKS, 12)
    assert dlogits.shape == (300, 12)
    assert (index.order_R.shape, index.token_R.shape, index.offset_E.shape) == ((900,), (900,), (13,))
    assert index.schedule.shape == (SCHEDULE_HEAD + 4 * max_row_blocks(900, 12),)
    assert {x.dtype for x in (*index, routing.expert_TK, routing.histogram_BE)} == {torch.int32}
    assert {x.dtype for x in (routing.gate_TK, dlogits)} == {torch.float32}


def test_groups_are_the_references_work() -> None:
    logits, bias = torch.randn(40, 12), torch.randn(12) * 0.2
    found = route(logits, bias, top_k=3, n_groups=4, n_limited_groups=2, route_scale=2.0)
    expected = reference.route(logits, bias, top_k=3, n_groups=4, n_limited_groups=2, route_scale=2.0)
    assert found.expert_TK.dtype == torch.int32
    assert torch.equal(found.expert_TK.long(), expected.expert_TK)
    assert torch.equal(found.gate_TK, expected.gate_TK)
    assert found.histogram_BE is None


cuda = partial(torch.empty, device="cuda")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: route(torch.empty(4, 8), torch.empty(8), top_k=2), "CUDA device.*found.*cpu"),
        (lambda: route(cuda(4, 8).double(), cuda(8), top_k=2), "float32.*found.*float64"),
        (lambda: route(cuda(8, 4).T, cuda(8), top_k=2), "contiguous.*found.*strided"),
        (lambda: route(cuda(4, 8), cuda(7), top_k=2), "bias of 8 values.*found \\(7,\\)"),
        (
            lambda: route(cuda(4, 8), torch.empty(8, device="cuda:1"), top_k=2),
            "bias of 8 values on cuda:0, found \\(8,\\) on cuda:1",
        ),
        (lambda: route(cuda(4, 8), cuda(8), top_k=9), "top_k from 1 to 8.*found 9"),
        (lambda: route(cuda(4, 64), cuda(64), top_k=33), "top_k from 1 to 32.*found 33"),
        (lambda: route(cuda(4, 64), cuda(64), top_k=0), "top_k from 1 to 32.*found 0"),
        (lambda: route(cuda(4, 4097), cuda(4097), top_k=1), "1 to 4096 experts, found 4097"),
        (lambda: index_rows(torch.empty(4, 2, dtype=torch.int32), 8), "CUDA device.*found.*cpu"),
        (lambda: index_rows(cuda(4, 2, dtype=torch.int64), 8), "int32.*found.*int64"),
        (lambda: index_rows(cuda(2, 4, dtype=torch.int32).T, 8), "contiguous.*found.*strided"),
        (lambda: index_rows(cuda(4, 0, dtype=torch.int32), 8), "found none"),
        (lambda: index_rows(cuda(4, 2, dtype=torch.int32), 0), "1 to 4096 experts, found 0"),
        (lambda: index_rows(cuda(1 << 27, 8, dtype=torch.int32), 8), "fewer than 2\\^30"),
        (
            lambda: index_rows(cuda(4, 2, dtype=torch.int32), 8, cuda(CHUNKS, 9, dtype=torch.int32)),
            f"\\({CHUNKS}, 8\\).*found \\({CHUNKS}, 9\\)",
        ),
        (
            lambda: index_rows(
                cuda(4, 2, dtype=torch.int32), 8, torch.empty(CHUNKS, 8, dtype=torch.int32, device="cuda:1")
            ),
            f"on cuda:0, found \\({CHUNKS}, 8\\) on cuda:1",
        ),
    ],
)
def test_refusals(call: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        call()


# --- on one ----------------------------------------------------------------------------------------------------------

# T, E, K: each of the quick selection's sizes, not all multiples of 4 or 32; K + 1 beyond a warp's lanes; none quick.
SHAPES = [
    (1000, 3, 2),
    (1, 8, 1),
    (333, 64, 6),
    (128, 126, 8),
    (4097, 128, 8),
    (2000, 256, 7),
    (257, 256, 32),
    (300, 250, 31),
    (500, 511, 10),
    (200, 4096, 8),
    (77, 513, 1),
]


def choices(logits_TE: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    return logits_TE.sigmoid() + bias_E


def check_nearly_best(expert_TK: torch.Tensor, choice_TE: torch.Tensor) -> None:
    """Distinct experts whose choices are, place by place, the best there are; within four units in the last place, as
    another fp32 sigmoid may differ by."""
    top_k = expert_TK.shape[1]
    found = choice_TE.gather(1, expert_TK.long())
    best = choice_TE.sort(dim=-1, descending=True).values[:, :top_k]
    assert ((found - best).abs() <= 4 * ULP * best.abs().clamp_min(1.0)).all()
    assert (expert_TK.long().sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [0.0, 0.2, 5.0])
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), SHAPES)
def test_route(gpu: str, n_tokens: int, n_experts: int, top_k: int, biased: float) -> None:
    """The best choices; gates within a dozen roundings; the histogram counts what was chosen, by run of tokens."""
    logits, bias = torch.randn(n_tokens, n_experts, device=gpu), torch.randn(n_experts, device=gpu) * biased
    found = route(logits, bias, top_k=top_k, route_scale=2.446)
    check_nearly_best(found.expert_TK, choices(logits, bias))
    chosen = logits.double().sigmoid().gather(1, found.expert_TK.long())
    gate = chosen / chosen.sum(1, keepdim=True) * 2.446
    torch.testing.assert_close(found.gate_TK.double(), gate, rtol=12 * ULP, atol=0)
    size = -(-n_tokens // CHUNKS)
    runs = [run.flatten().long().bincount(minlength=n_experts) for run in found.expert_TK.cpu().split(size)]
    counts = torch.zeros(CHUNKS, n_experts, dtype=torch.int32)
    counts[: len(runs)] = torch.stack(runs).int()
    assert found.histogram_BE is not None
    assert torch.equal(found.histogram_BE.cpu(), counts)


def stable_best(choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """On the CPU: NaN first, then falling, equals by expert id."""
    return torch.sort(choice_TE.cpu(), dim=-1, descending=True, stable=True).indices[:, :top_k].int()


@pytest.mark.gpu
@pytest.mark.parametrize(("n_experts", "top_k"), [(3, 3), (64, 6), (128, 8), (256, 7), (512, 10), (600, 4)])
@pytest.mark.parametrize("kind", ["quantised", "saturated", "equal", "one_lane", "bias_beyond"])
def test_ties_go_to_the_lower_expert(gpu: str, kind: str, n_experts: int, top_k: int) -> None:
    """Scores that are equal exactly in any fp32 sigmoid, or far apart."""
    bias = torch.zeros(n_experts, device=gpu)
    logits = torch.randint(-4, 5, (500, n_experts), device=gpu) * 0.5
    if kind == "saturated":
        values = torch.tensor([-float("inf"), -200.0, -88.5, -30.0, 0.0, 30.0, 200.0, float("inf")], device=gpu)
        logits = values[torch.randint(8, logits.shape, device=gpu)]
        bias[::2] = -0.0
    elif kind == "equal":
        logits.zero_()
    elif kind == "one_lane":  # all of the best are neighbours, and those of the next lane tie with them
        logits.fill_(-3.0)
        logits[:, 1:9] = torch.randint(1, 3, logits[:, 1:9].shape, device=gpu).float()
    elif kind == "bias_beyond":  # of what the quick selection can hold
        bias = torch.randint(-1, 2, (n_experts,), device=gpu) * 4.0
    found = route(logits, bias, top_k=top_k)
    assert torch.equal(found.expert_TK.cpu(), stable_best(choices(logits, bias), top_k))


@pytest.mark.gpu
@pytest.mark.parametrize("n_experts", [64, 128, 256, 600])
def test_choices_that_differ_little_keep_their_order(gpu: str, n_experts: int) -> None:
    """Steps of a few units in the last place around 0.5 + bias, finer than the quick selection tells apart. The scores
    are all 1/2 exactly, so that the order is that of the biases."""
    bias = (torch.randperm(n_experts, device=gpu) + 1) * 4 * ULP
    found = route(torch.zeros(100, n_experts, device=gpu), bias, top_k=6)
    assert torch.equal(found.expert_TK.cpu(), stable_best(bias.expand(100, -1) + 0.5, 6))


@pytest.mark.gpu
@pytest.mark.parametrize(("n_experts", "top_k"), [(5, 5), (128, 8), (256, 7), (512, 10), (600, 4)])
def test_nan_ranks_first_and_breaks_nothing(gpu: str, n_experts: int, top_k: int) -> None:
    logits, bias = torch.randint(-4, 5, (300, n_experts), device=gpu) * 0.5, torch.zeros(n_experts, device=gpu)
    lost = torch.rand(logits.shape, device=gpu) < 1.5 / n_experts
    lost[0] = True
    logits[lost] = float("nan")
    found = route(logits, bias, top_k=top_k)
    assert torch.equal(found.expert_TK.cpu(), stable_best(choices(logits, bias), top_k))
    assert torch.equal(found.gate_TK.isnan().all(1), lost.any(1))
    bias[n_experts // 2] = float("nan")
    found = route(torch.randn(300, n_experts, device=gpu), bias, top_k=top_k)
    assert (found.expert_TK[:, 0] == n_experts // 2).all()
    assert ((found.expert_TK >= 0) & (found.expert_TK < n_experts)).all()


@pytest.mark.gpu
def test_logits_off_by_a_word(gpu: str) -> None:
    """A view that 16-byte loads cannot read."""
    logits, bias = torch.randn(100 * 128 + 1, device=gpu)[1:].view(100, 128), torch.zeros(128, device=gpu)
    found, expected = route(logits, bias, top_k=8), route(logits.clone(), bias, top_k=8)
    assert torch.equal(found.expert_TK, expected.expert_TK)
    assert torch.equal(found.gate_TK, expected.gate_TK)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    # The last two: a last block that is no multiple of 16 bytes, or less than 16.
    [*SHAPES, (4096, 256, 7), (33, 5, 3), (1, 3, 2)],
)
def test_route_backward(gpu: str, n_tokens: int, n_experts: int, top_k: int) -> None:
    """Against autograd in float64 through the same experts; exactly zero elsewhere."""
    logits = torch.randn(n_tokens, n_experts, device=gpu, requires_grad=True)
    found = route(logits, torch.zeros(n_experts, device=gpu), top_k=top_k, route_scale=2.446)
    dgate = torch.randn(n_tokens, top_k, device=gpu)
    found.gate_TK.backward(dgate)
    exact = logits.detach().double().requires_grad_()
    chosen = exact.sigmoid().gather(1, found.expert_TK.long())
    (chosen / chosen.sum(1, keepdim=True) * 2.446).backward(dgate.double())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=4e-6)
    others = torch.ones_like(logits).scatter(1, found.expert_TK.long(), 0.0).bool()
    assert not logits.grad[others].any()
    assert not torch.signbit(logits.grad[others]).any()


@pytest.mark.gpu
def test_an_expanded_gradient(gpu: str) -> None:
    """What `.sum()` hands back: one value with strides of 0. Gates sum to the scale, so that nothing remains of it."""
    logits = torch.randn(50, 64, device=gpu, requires_grad=True)
    route(logits, torch.zeros(64, device=gpu), top_k=6).gate_TK.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=1e-6)


def distinct(n_tokens: int, n_experts: int, top_k: int) -> torch.Tensor:
    return torch.rand(n_tokens, n_experts).argsort(1)[:, :top_k].int().contiguous()


def check_index(found: RowIndex, expert_TK: torch.Tensor, n_experts: int) -> None:
    expected = reference.index_rows(expert_TK.cpu().long(), n_experts)
    for name in reference.RowIndex._fields:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == torch.int32, name
        assert torch.equal(a.cpu(), b.int()), name
    assert found.token_R.dtype == torch.int32
    assert torch.equal(found.token_R.cpu(), (expected.order_R // expert_TK.shape[1]).int())
    check_schedule(found.schedule, expected.offset_E.tolist())


def check_schedule(schedule: torch.Tensor, edges: list[int]) -> None:
    """The blocks that `edges` make, one after another; their rows are all rows, each once."""
    blocks = [
        [e, row, min(BLOCK_ROWS, last - row), 0]
        for e, (first, last) in enumerate(pairwise(edges))
        for row in range(first, last, BLOCK_ROWS)
    ]
    assert schedule.dtype == torch.int32
    words = schedule.tolist()
    assert words[:SCHEDULE_HEAD] == [len(blocks)] + [0] * (SCHEDULE_HEAD - 1)
    found = [words[at : at + 4] for at in range(SCHEDULE_HEAD, SCHEDULE_HEAD + 4 * len(blocks), 4)]
    assert found == blocks
    assert [row for _, first, rows, _ in found for row in range(first, first + rows)] == list(range(edges[-1]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    # 1025 and 2049: the least that leave a block fewer warps.
    [*SHAPES, (40960, 128, 8), (0, 7, 3), *((1000, n_experts, 5) for n_experts in (1024, 1025, 2048, 2049))],
)
def test_index_rows(gpu: str, n_tokens: int, n_experts: int, top_k: int) -> None:
    """Equal to the reference, number for number; the schedule covers each row once."""
    expert_TK = distinct(n_tokens, n_experts, top_k).to(gpu)
    check_index(index_rows(expert_TK, n_experts), expert_TK, n_experts)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_tokens", "n_experts"), [(140_000, 64), (280_000, 64), (131_073, 12), (70_000, 1500), (40_000, 4096)]
)
def test_index_rows_of_more_than_a_block_has_at_a_time(gpu: str, n_tokens: int, n_experts: int) -> None:
    """Two passes or three, of 8192 rows, 4096 or 2048; and of some blocks fewer."""
    first = torch.randint(n_experts, (n_tokens, 1))
    first[::5] = 3
    expert_TK = ((first + torch.arange(8)) % n_experts).int().to(gpu)
    check_index(index_rows(expert_TK, n_experts), expert_TK, n_experts)


@pytest.mark.gpu
@pytest.mark.parametrize("n_experts", [319, 320, 326, 327, 328, 329])
def test_index_rows_where_shared_memory_passes_48_kib(
    gpu: str, n_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launch asks for passes 48 KiB at 329 experts, with the kernel's own 384 bytes at 327, and with the KiB
    the system keeps of each block at 320. The kernel is loaded anew each time, for a limit once raised stays so."""
    monkeypatch.setitem(routing_cuda._INDEX, 1024, CudaKernel(routing_cuda._INDEX[1024].source))
    expert_TK = distinct(1000, n_experts, 6).to(gpu)
    check_index(index_rows(expert_TK, n_experts), expert_TK, n_experts)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, BLOCK_ROWS, BLOCK_ROWS + 1, 5000, 100_000])
@pytest.mark.parametrize(("expert", "n_experts"), [(0, 1), (0, 128), (127, 128), (4, 7), (4095, 4096)])
def test_all_rows_to_one_expert(gpu: str, expert: int, n_experts: int, n_tokens: int) -> None:
    expert_TK = torch.full((n_tokens, 1), expert, dtype=torch.int32, device=gpu)
    check_index(index_rows(expert_TK, n_experts), expert_TK, n_experts)


@pytest.mark.gpu
def test_experts_without_rows(gpu: str) -> None:
    """Every other one, the first and the last."""
    expert_TK = (distinct(40, 7, 3) * 2 + 1).to(gpu)
    check_index(index_rows(expert_TK, 16), expert_TK, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [*SHAPES, (0, 12, 3)])
def test_index_rows_from_the_routes_counts(gpu: str, n_tokens: int, n_experts: int, top_k: int) -> None:
    routing = route(torch.randn(n_tokens, n_experts, device=gpu), torch.zeros(n_experts, device=gpu), top_k=top_k)
    check_index(index_rows(routing.expert_TK, n_experts, routing.histogram_BE), routing.expert_TK, n_experts)


@pytest.mark.gpu
def test_bits_do_not_change_between_runs(gpu: str) -> None:
    """Ties, skew and equal addresses included."""
    logits = torch.randn(4000, 128, device=gpu)
    logits[::3] = (logits[::3] * 2).round()
    logits[:, 5] += 6.0
    dgate = torch.randn(4000, 8, device=gpu)

    def once() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        routing = route(leaf, torch.zeros(128, device=gpu), top_k=8)
        routing.gate_TK.backward(dgate)
        index = index_rows(routing.expert_TK, 128, routing.histogram_BE)
        entries = SCHEDULE_HEAD + 4 * int(index.schedule[0])
        assert leaf.grad is not None
        return [routing.expert_TK, routing.gate_TK.detach(), leaf.grad, *index[:4], index.schedule[:entries]]

    first = once()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    """A replay sees the logits of its time."""
    logits, bias = torch.randn(1000, 128, device=gpu), torch.zeros(128, device=gpu)
    warm = route(logits, bias, top_k=8)
    index_rows(warm.expert_TK, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route(logits, bias, top_k=8)
        counted = index_rows(routing.expert_TK, 128, routing.histogram_BE)
        uncounted = index_rows(routing.expert_TK, 128)
    for _ in range(2):
        logits.copy_(torch.randn(1000, 128))
        graph.replay()
        expected = route(logits, bias, top_k=8)
        assert torch.equal(routing.expert_TK, expected.expert_TK)
        assert torch.equal(routing.gate_TK, expected.gate_TK)
        for index in (counted, uncounted):
            check_index(index, expected.expert_TK, 128)


@pytest.mark.gpu
def test_fake_shapes_are_the_real_ones(gpu: str) -> None:
    """And no argument is written, though the schema says so."""
    checks = ("test_schema", "test_faketensor")
    logits, bias = torch.randn(50, 12, device=gpu), torch.zeros(12, device=gpu)
    torch.library.opcheck(torch.ops.nmoe.route.default, (logits, bias, 3, 1.0), test_utils=checks)
    expert, gate, score, _ = torch.ops.nmoe.route(logits, bias, 3, 1.0)
    arguments = (torch.randn_like(gate), expert, score, 12, 1.0)
    torch.library.opcheck(torch.ops.nmoe.route_backward.default, arguments, test_utils=checks)
    fake = routing_cuda._index_rows_fake(expert, 12, None)
    for real, empty in zip(index_rows(expert, 12), fake, strict=True):
        assert (real.shape, real.dtype, real.device) == (empty.shape, empty.dtype, empty.device)
