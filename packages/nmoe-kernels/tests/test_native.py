"""The native tier, and what both tiers share: refusals and shapes without a GPU; values on one, against float64 on the
CPU (`-m gpu`)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import Ops, select_ops
from nmoe.kernels.reference import cross_entropy
from nmoe.kernels.reference.grouped_gemm import grouped_wgrad
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import grouped_gemm_cuda
from nmoe.kernels.native.experts_cuda import experts
from nmoe.kernels.native.routing_cuda import CHUNKS, SCHEDULE_HEAD, RowIndex, index_rows
from nmoe.kernels.native.tiles import CANDIDATES, Tile

ROUNDING = 2.0**-8
"""Of bf16, relative."""


@pytest.fixture
def native(gpu: str) -> Ops:
    return select_ops("native", gpu)


def norm_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative; absolute (in hundredths) where the exact value is 0, as the gradient of a lone key's score is."""
    return float((found.detach().double().cpu() - exact).norm() / exact.norm().clamp_min(1e-2))


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = (distance < 0) | (distance >= (window or keys))
    return (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [(256, 256, None), (77, 77, None), (1, 1, None), (300, 300, 64), (1, 77, None), (3, 77, 20)],
)
def test_attention(native: Ops, queries: int, keys: int, window: int | None, widths: tuple[int, int]) -> None:
    """Output and gradients within two bf16 roundings of the norm: probabilities and results are rounded once each, and
    the errors of a sum's terms are independent."""
    width, value = widths
    shapes = ((queries, width), (keys, width), (keys, value))
    inputs = [torch.randn(2, 4, n, w, device="cuda").bfloat16().requires_grad_() for n, w in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    scale = width**-0.5
    found = native.attention(*inputs, scale=scale, window=window)
    expected = naive_attention(*exact, scale=scale, window=window)
    dout = torch.randn_like(found)
    found.backward(dout)
    expected.backward(dout.double().cpu())
    assert norm_error(found, expected.detach()) < 2 * ROUNDING
    for a, b in zip(inputs, exact, strict=True):
        assert norm_error(a.grad, b.grad) < 2 * ROUNDING
    wrong = naive_attention(*(x.detach() for x in exact), scale=scale * 1.1, window=window)
    assert queries == 1 or norm_error(found, wrong) > 2 * ROUNDING


@pytest.mark.gpu
def test_reference_wgrad_rounds_no_product() -> None:
    """bf16 into fp32 on the device: 256 terms in fp32."""
    sizes = (100, 0, 1, 155)
    a, b = (torch.randn(256, n, device="cuda").bfloat16() for n in (96, 64))
    offset = torch.tensor([0, 100, 100, 101, 256], dtype=torch.int32, device="cuda")
    into = torch.zeros(4, 96, 64, device="cuda")
    grouped_wgrad(a, b, offset, into, add=True)
    pairs = zip(a.double().cpu().split(sizes), b.double().cpu().split(sizes), strict=True)
    assert norm_error(into, torch.stack([x.T @ y for x, y in pairs])) < 1e-5


@pytest.mark.gpu
def test_linear_cross_entropy(native: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows in chunks: the loss in fp32's precision, gradients within two bf16 roundings."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 100 * 1000)
    x, weight = (torch.randn(n, 64, device="cuda").bfloat16() for n in (333, 1000))
    target = torch.randint(1000, (333,), device="cuda")
    target[::7] = -100
    exact = [tensor.double().cpu().requires_grad_() for tensor in (x, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target.cpu(), reduction="sum")
    expected.backward()
    x.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    found = native.linear_cross_entropy(x, weight, target)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert norm_error(x.grad, exact[0].grad) < 2 * ROUNDING
    assert norm_error(weight.main_grad, exact[1].grad) < 2 * ROUNDING


class Problem(NamedTuple):
    """Sizes of a routed layer, and which experts its tokens like."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int
    liked: str = "any"
    """`any`; `not_all`: the first and every third have no rows; `same`: all tokens go to the last K."""


PROBLEMS = [
    Problem(200, 64, 96, 6, 3, "not_all"),
    Problem(1, 128, 64, 8, 8),
    Problem(1, 264, 40, 64, 6),
    Problem(300, 72, 40, 5, 1),
    Problem(20, 64, 48, 300, 2),
    Problem(1000, 136, 200, 4, 2),
    Problem(700, 8, 8, 3, 2),
    Problem(513, 328, 72, 16, 4, "same"),
    Problem(257, 512, 256, 8, 2),
    Problem(2000, 64, 64, 9, 3, "not_all"),
]
IN_PIECES = [Problem(13_000, 264, 72, 8, 2, "same"), Problem(9000, 136, 200, 4, 2)]
"""Some experts have so many rows that their weights' gradients are sums of pieces."""


class Layer(NamedTuple):
    """Inputs of a routed layer; bf16 but for logits and bias, which are fp32."""

    x: torch.Tensor
    logits: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    bias: torch.Tensor
    dout: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        """x, logits, w13 and w2, each with a gradient to come."""
        return [tensor.detach().requires_grad_() for tensor in self[:4]]


def draw_layer(problem: Problem) -> Layer:
    """Of random numbers from the CPU, about 1 in each product's result."""
    tokens, width, hidden, n_experts, top_k, liked = problem
    bias = torch.zeros(n_experts)
    if liked == "not_all":
        bias[::3] = -4.0
    elif liked == "same":
        bias[-top_k:] = 4.0
    drawn = (
        torch.randn(tokens, width).bfloat16(),
        torch.randn(tokens, n_experts),
        (torch.randn(n_experts, 2, hidden, width) * width**-0.5).bfloat16(),
        (torch.randn(n_experts, width, hidden) * hidden**-0.5).bfloat16(),
        bias,
        torch.randn(tokens, width).bfloat16(),
    )
    return Layer(*(tensor.to("cuda") for tensor in drawn))


class Result(NamedTuple):
    """What a layer gives: its output, and the gradients of its inputs and of its gates."""

    out: torch.Tensor
    x: torch.Tensor | None
    logits: torch.Tensor | None
    w13: torch.Tensor | None
    w2: torch.Tensor | None
    gate: torch.Tensor | None


SCALE = 2.446


def run(ops: Ops, layer: Layer, leaves: Sequence[torch.Tensor], top_k: int) -> Result:
    """Route, index and experts, and one backward."""
    x, logits, w13, w2 = leaves
    routing = ops.route(logits, layer.bias, top_k=top_k, route_scale=SCALE)
    if routing.gate_TK.requires_grad:
        routing.gate_TK.retain_grad()
    out = ops.experts(x, ops.index_rows(routing, w13.shape[0]), routing.gate_TK, w13, w2)
    out.backward(layer.dout)
    return Result(out.detach(), x.grad, logits.grad, w13.grad, w2.grad, routing.gate_TK.grad)


def exact_result(layer: Layer, expert_TK: torch.Tensor) -> Result:
    """In float64 on the CPU, by autograd, expert after expert; `expert_TK` is given, for a choice has no gradient."""
    x, logits, w13, w2 = (tensor.detach().double().cpu().requires_grad_() for tensor in layer[:4])
    score_TK = logits.sigmoid().gather(1, expert_TK)
    gate_TK = SCALE * score_TK / score_TK.sum(1, keepdim=True)
    gate_TK.retain_grad()
    out = torch.zeros_like(x)
    for expert in expert_TK.unique().tolist():
        token, slot = (expert_TK == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ half.T for half in w13[expert])
        y = (gate * gate.sigmoid() * up) @ w2[expert].T
        out = out.index_add(0, token, gate_TK[token, slot, None] * y)
    out.backward(layer.dout.double().cpu())
    return Result(out.detach(), x.grad, logits.grad, w13.grad, w2.grad, gate_TK.grad)


def chosen(ops: Ops, layer: Layer, top_k: int) -> torch.Tensor:
    return ops.route(layer.logits, layer.bias, top_k=top_k).expert_TK.long().cpu()


def tile_of(product: str, number: int) -> Tile:
    """The candidate of that number, or the last where there are fewer."""
    return CANDIDATES[product][min(number, len(CANDIDATES[product]) - 1)]


def same(a: Sequence[torch.Tensor | None], b: Sequence[torch.Tensor | None]) -> bool:
    """Bit for bit."""
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *IN_PIECES], ids=lambda p: "-".join(map(str, p)))
def test_experts(native: Ops, problem: Problem) -> None:
    """Output and every gradient within two bf16 roundings of the norm: at most five lie on a way, and they are
    independent (one alone errs by 0.0017 of a norm). A lone expert's gate does not depend on its logit."""
    layer = draw_layer(problem)
    expert_TK = chosen(native, layer, problem.top_k)
    found, exact = run(native, layer, layer.leaves(), problem.top_k), exact_result(layer, expert_TK)
    for name, a, b in zip(Result._fields, found, exact, strict=True):
        assert a.shape == b.shape, name
        assert norm_error(a, b) < 2 * ROUNDING, name
    without_rows = torch.ones(problem.experts, dtype=torch.bool)
    without_rows[expert_TK.unique()] = False
    assert without_rows.any() == (problem.liked != "any" or problem.experts > problem.tokens * problem.top_k)
    assert not found.w13[without_rows.to(found.w13.device)].any()
    assert not found.w2[without_rows.to(found.w2.device)].any()
    if problem.top_k > 1:  # the tolerance sees experts that are exchanged
        wrong = exact_result(layer, expert_TK.roll(1, 1))
        assert norm_error(found.gate, wrong.gate) > 2 * ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("problem", [*PROBLEMS, *IN_PIECES], ids=lambda p: "-".join(map(str, p)))
def test_a_tile_has_no_influence_on_bits(
    native: Ops, problem: Problem, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But on a gate's gradient, whose parts are summed tile by tile: that agrees within a rounding of fp32's sums."""
    layer = draw_layer(problem)
    expected = run(native, layer, layer.leaves(), problem.top_k)
    monkeypatch.setattr(grouped_gemm_cuda, "choose_tile", lambda product, *_: tile_of(product, number))
    found = run(native, layer, layer.leaves(), problem.top_k)
    for name, a, b in zip(Result._fields, found, expected, strict=True):
        if name in ("logits", "gate"):
            assert norm_error(a, b.double().cpu()) < 1e-4
        else:
            assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[4], PROBLEMS[7]], ids=["some", "most_empty", "same"])
def test_main_grad_is_overwritten_when_stale_and_added_to_when_not(native: Ops, problem: Problem) -> None:
    """In fp32: what autograd gets without it is the same, rounded once. The second of two equal gradients doubles the
    first exactly."""
    layer = draw_layer(problem)
    plain = run(native, layer, layer.leaves(), problem.top_k)
    leaves = layer.leaves()
    weights = leaves[2:]
    for weight in weights:
        weight.main_grad = torch.full(weight.shape, float("nan"), device=weight.device)
        weight.main_grad_stale = True
    once = run(native, layer, leaves, problem.top_k)
    assert (once.w13, once.w2) == (None, None)
    assert same((once.out, once.x, once.logits, once.gate), (plain.out, plain.x, plain.logits, plain.gate))
    first = [weight.main_grad.clone() for weight in weights]
    for accumulator, grad in zip(first, (plain.w13, plain.w2), strict=True):
        assert accumulator.isfinite().all()
        assert torch.equal(accumulator.bfloat16(), grad)
        assert not torch.equal(accumulator, grad.float()), "not rounded"
    run(native, layer, leaves, problem.top_k)
    assert same([weight.main_grad for weight in weights], [2 * grad for grad in first])
    before = [torch.randn_like(grad) for grad in first]
    for weight, start in zip(weights, before, strict=True):
        weight.main_grad.copy_(start)
    run(native, layer, leaves, problem.top_k)
    assert same([weight.main_grad for weight in weights], [a + b for a, b in zip(before, first, strict=True)])


def routed(tokens: int, n_experts: int, top_k: int, liked: int) -> RowIndex:
    """Rows of tokens that go to any K neighbouring experts, but half of them to those from `liked` on."""
    first_T = torch.randint(n_experts - top_k + 1, (tokens,))
    first_T[torch.rand(tokens) < 0.5] = liked
    return index_rows((first_T[:, None] + torch.arange(top_k)).to("cuda", torch.int32), n_experts)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 700, 20_000, 150_000])
@pytest.mark.parametrize(("n_experts", "m", "n"), [(5, 72, 40), (64, 768, 768), (300, 2816, 2048), (4096, 16, 768)])
def test_a_plan_has_each_row_once_and_the_largest_pieces_first(
    gpu: str, tokens: int, n_experts: int, m: int, n: int
) -> None:
    """An expert's pieces come in their order, one of no rows where it has none; none is longer than a share of all,
    but for those of experts with 4,096 and less; and tiles have no influence."""
    index = routed(tokens, n_experts, 2, liked=n_experts // 2)
    (plan, turn), (again, _) = (grouped_gemm_cuda.plan_wgrad(index, n_experts, m, n, tiles) for tiles in (7, 3))
    entries = plan[1 : 1 + int(plan[0, 0])].tolist()
    assert again[1 : 1 + int(again[0, 0])].tolist() == entries
    assert turn.shape == (n_experts, 7)
    assert not turn.any()
    offset, share = index.offset_E.tolist(), max(4096, -(-2 * tokens * -(-m * n // 32_768) // 128))
    pieces: dict[int, list[tuple[int, int]]] = {}
    order: list[tuple[int, int]] = []
    before = -1
    for expert, first, rows, piece in entries:
        so_far = pieces.setdefault(expert, [])
        if not so_far:
            order.append((-rows, expert))
        assert piece // 2 == len(so_far)
        assert first == offset[expert] + sum(length for length, _ in so_far)
        assert not so_far or before == expert
        before = expert
        so_far.append((rows, piece % 2))
        assert piece % 2 == (first + rows < offset[expert + 1])
        assert rows % 64 == 0 or piece % 2 == 0
        assert rows <= share + 63
    assert order == sorted(order)
    assert sorted(pieces) == list(range(n_experts))
    for expert, found in pieces.items():
        assert sum(rows for rows, _ in found) == offset[expert + 1] - offset[expert]
        assert len(found) == 1 or sum(rows for rows, _ in found) > share
    assert any(len(found) > 1 for found in pieces.values()) == (max(index.offset_E.diff().tolist()) > share)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize(("tokens", "liked"), [(9000, 0), (60_000, 10), (60_000, 3)])
def test_weight_gradients_of_many_rows_lose_none(gpu: str, tokens: int, liked: int, number: int) -> None:
    """Of small whole numbers, whose sums fp32 holds: exact, overwritten and added, beside other work, in any tiles."""
    n_experts, width, hidden = 12, 392, 136
    index, down, up = routed(tokens, n_experts, 2, liked), tile_of("wgrad_down", number), tile_of("wgrad_up", number)
    token_R, experts_of_rows = index.token_R.long(), index.offset_E.diff().tolist()

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-2, 3, (rows, columns), device=gpu).bfloat16()

    x_TD, dout_TD = draw(tokens, width), draw(tokens, width)
    gated_RF, dpre_R2F = draw(2 * tokens, hidden), draw(2 * tokens, 2 * hidden)
    by_expert = [part.split(experts_of_rows) for part in (dout_TD[token_R], gated_RF, dpre_R2F, x_TD[token_R])]
    exact_down = torch.stack([a.double().T @ b.double() for a, b in zip(*by_expert[:2], strict=True)])
    exact_up = torch.stack([a.double().T @ b.double() for a, b in zip(*by_expert[2:], strict=True)])
    assert float(exact_up.abs().max()) < 2**23
    into_down = torch.full((n_experts, width, hidden), float("nan"), device=gpu)
    into_up = torch.full((n_experts, 2, hidden, width), float("nan"), device=gpu)
    busy, other = torch.randn(4096, 4096, device=gpu).bfloat16(), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for times in (1, 2, 3):
        with torch.cuda.stream(other):
            busy @ busy
        grouped_gemm_cuda.wgrad_down(dout_TD, gated_RF, index, into_down, add=times > 1, tile=down)
        grouped_gemm_cuda.wgrad_up(dpre_R2F, x_TD, index, into_up, add=times > 1, tile=up)
        assert torch.equal(into_down.double(), times * exact_down), times
        assert torch.equal(into_up.double().flatten(1, 2), times * exact_up), times
    other.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [(2,), (3,), (2, 3), (0, 1), (0, 1, 2)], ids=str)
def test_inputs_that_need_no_gradient(native: Ops, frozen: tuple[int, ...]) -> None:
    """Of x, logits, w13 and w2. The others' gradients keep their bits, and a frozen weight's main_grad its own."""
    problem = PROBLEMS[0]
    layer = draw_layer(problem)
    whole, leaves = run(native, layer, layer.leaves(), problem.top_k), layer.leaves()
    for i in frozen:
        leaves[i].requires_grad_(False)
        leaves[i].main_grad, leaves[i].main_grad_stale = torch.full(leaves[i].shape, float("nan"), device="cuda"), True
    found = run(native, layer, leaves, problem.top_k)
    expected = [None if i - 1 in frozen else tensor for i, tensor in enumerate(whole[:5])]
    assert same(found[:5], expected)
    for i in frozen:
        assert leaves[i].main_grad.isnan().all()
        assert leaves[i].main_grad_stale


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: "-".join(map(str, p)))
def test_inference_gives_the_bits_of_training(native: Ops, problem: Problem, mode: Any) -> None:
    layer = draw_layer(problem)
    trained = run(native, layer, layer.leaves(), problem.top_k)
    with mode():
        routing = native.route(layer.logits, layer.bias, top_k=problem.top_k, route_scale=SCALE)
        index = native.index_rows(routing, problem.experts)
        out = native.experts(layer.x, index, routing.gate_TK, layer.w13, layer.w2)
    assert not out.requires_grad
    assert torch.equal(out, trained.out)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [*PROBLEMS, *IN_PIECES], ids=lambda p: "-".join(map(str, p)))
def test_experts_are_bitwise_the_same_from_run_to_run(native: Ops, problem: Problem) -> None:
    layer = draw_layer(problem)
    first = run(native, layer, layer.leaves(), problem.top_k)
    for _ in range(5):
        assert same(run(native, layer, layer.leaves(), problem.top_k), first)


@pytest.mark.gpu
def test_an_expanded_output_gradient(native: Ops) -> None:
    """What `.sum()` hands back has strides of 0."""
    problem = PROBLEMS[0]
    layer = draw_layer(problem)
    expanded = layer._replace(dout=torch.ones((), dtype=torch.bfloat16, device="cuda").expand_as(layer.dout))
    found = run(native, expanded, layer.leaves(), problem.top_k)
    dense = layer._replace(dout=torch.ones_like(layer.dout))
    assert same(found, run(native, dense, layer.leaves(), problem.top_k))


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Its copy, contiguous, one value behind a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    copy = room[1:].view(tensor.shape).copy_(tensor)
    assert copy.data_ptr() % 16
    return copy


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["x", "dout"])
def test_tokens_off_by_a_value(native: Ops, which: str) -> None:
    """A view that TMA and 16-byte copies cannot read."""
    problem = PROBLEMS[0]
    layer = draw_layer(problem)
    expected = run(native, layer, layer.leaves(), problem.top_k)
    moved = layer._replace(**{which: misaligned(getattr(layer, which))})
    leaves = moved.leaves()
    assert which == "dout" or leaves[0].data_ptr() % 16
    assert same(run(native, moved, leaves, problem.top_k), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["w13", "w2"])
def test_weights_off_by_a_value_are_refused(native: Ops, which: str) -> None:
    problem = PROBLEMS[0]
    layer = draw_layer(problem)
    moved = layer._replace(**{which: misaligned(getattr(layer, which))})
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        run(native, moved, moved.leaves(), problem.top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: "-".join(map(str, p)))
def test_products_leave_their_counters_at_zero(native: Ops, problem: Problem) -> None:
    """An index serves again and again: training that overwrites and then adds, and inference between; same bits."""
    layer = draw_layer(problem)
    x, _, w13, w2 = layer.leaves()
    routing = native.route(layer.logits, layer.bias, top_k=problem.top_k, route_scale=SCALE)
    index = native.index_rows(routing, problem.experts)
    before = index.schedule.clone()
    assert before[0] > 0
    assert not before[1:SCHEDULE_HEAD].any()
    gate = routing.gate_TK.detach().requires_grad_()
    for weight in (w13, w2):
        weight.main_grad, weight.main_grad_stale = torch.full(weight.shape, float("nan"), device="cuda"), True
    first: list[torch.Tensor] = []
    for times in (1, 2):
        out = native.experts(x, index, gate, w13, w2)
        found = [out.detach(), *torch.autograd.grad(out, (x, gate), layer.dout)]
        found += [weight.main_grad / times for weight in (w13, w2)]
        with torch.no_grad():
            assert torch.equal(native.experts(x, index, gate, w13, w2), out)
        assert torch.equal(index.schedule[:SCHEDULE_HEAD], before[:SCHEDULE_HEAD]), times
        entries = SCHEDULE_HEAD + 4 * int(before[0])
        assert torch.equal(index.schedule[:entries], before[:entries])
        first = first or found
        assert same(found, first)


@pytest.mark.gpu
def test_a_gradients_gradient_is_refused(native: Ops) -> None:
    problem = PROBLEMS[0]
    layer = draw_layer(problem)
    x, logits, w13, w2 = layer.leaves()
    routing = native.route(logits, layer.bias, top_k=problem.top_k)
    out = native.experts(x, native.index_rows(routing, problem.experts), routing.gate_TK, w13, w2)
    dout = layer.dout.clone().requires_grad_()
    (dx,) = torch.autograd.grad(out, x, dout, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.float().sum().backward()


@pytest.mark.gpu
def test_no_tokens(native: Ops) -> None:
    """A stale main_grad becomes zeros, which is the gradient of nothing."""
    layer = draw_layer(Problem(0, 64, 96, 6, 3))
    leaves = layer.leaves()
    for weight in leaves[2:]:
        weight.main_grad, weight.main_grad_stale = torch.full(weight.shape, float("nan"), device="cuda"), True
    found = run(native, layer, leaves, 3)
    assert found.out.shape == (0, 64)
    assert all(not weight.main_grad.any() for weight in leaves[2:])
    run(native, layer, leaves, 3)
    assert all(not weight.main_grad.any() for weight in leaves[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[5], IN_PIECES[1]], ids=["some_empty", "many_rows", "pieces"])
def test_experts_in_a_cuda_graph(native: Ops, problem: Problem, capture: Any) -> None:
    """Forward and backward in one graph; a replay sees the inputs of its time, whose rows are routed otherwise."""
    layer, later = draw_layer(problem), [draw_layer(problem) for _ in range(2)]

    def step() -> Result:
        return run(native, layer, layer.leaves(), problem.top_k)

    graph, captured = capture(step)
    for inputs in later:
        for static, tensor in zip(layer, inputs, strict=True):
            static.copy_(tensor)
        graph.replay()
        eager = step()
        assert same(captured, eager)
        assert eager.out.any()


# --- without a GPU ---------------------------------------------------------------------------------------------------


cuda = partial(torch.empty, dtype=torch.bfloat16, device="cuda")


def fake_index(tokens: int, n_experts: int, top_k: int) -> RowIndex:
    counts = cuda(CHUNKS, n_experts, dtype=torch.int32)
    return index_rows(cuda(tokens, top_k, dtype=torch.int32), n_experts, counts)


def fake_arguments(**changes: torch.Tensor | RowIndex) -> dict[str, Any]:
    """Of `experts`: 20 tokens of 16 values, 6 experts of width 24, 2 a token."""
    arguments = {
        "x_TD": cuda(20, 16),
        "index": fake_index(20, 6, 2),
        "gate_TK": cuda(20, 2, dtype=torch.float32),
        "w13_e2FD": cuda(6, 2, 24, 16),
        "w2_eDF": cuda(6, 16, 24),
    }
    return arguments | changes


def shapes(tensors: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("training", [True, False])
def test_fake_shapes(training: bool) -> None:
    with FakeTensorMode():
        x, index, gate, w13, w2 = fake_arguments().values()
        both = torch.ops.nmoe.experts(x, *index, gate, w13, w2, training)
        assert shapes(both) == [((20, 16), torch.bfloat16), ((40 if training else 0, 48), torch.bfloat16)]
        into = (cuda(*w13.shape, dtype=torch.float32), None)
        pre = cuda(40, 48)
        given = torch.ops.nmoe.experts_backward(x, x, *index, gate, pre, w13, w2, *into, False, False)
        assert shapes(given) == [((20, 16), torch.bfloat16), ((20, 2), torch.float32)]


@pytest.mark.parametrize("given", ["nothing", "main_grad", "stale"])
def test_fake_gradients(given: str) -> None:
    """What autograd gets: all gradients, in their tensors' dtypes, but those that go to a main_grad."""
    with FakeTensorMode():
        arguments = fake_arguments()
        x, gate, w13, w2 = leaves = [arguments[n].requires_grad_() for n in ("x_TD", "gate_TK", "w13_e2FD", "w2_eDF")]
        w2.requires_grad_(False)
        if given != "nothing":
            w13.main_grad, w13.main_grad_stale = cuda(*w13.shape, dtype=torch.float32), given == "stale"
            w2.main_grad, w2.main_grad_stale = cuda(*w2.shape, dtype=torch.float32), True
        out = experts(**arguments)
        assert out.requires_grad
        grads = out.grad_fn.apply(torch.empty_like(out), None)
    dx, dgate, dw13, dw2 = (grads[i] for i in (0, 6, 7, 8))
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (dgate.shape, dgate.dtype) == (gate.shape, gate.dtype)
    assert dw2 is None
    assert sum(grad is not None for grad in grads) == (3 if given == "nothing" else 2)
    if given == "nothing":
        assert (dw13.shape, dw13.dtype) == (w13.shape, torch.bfloat16)
        assert not any(hasattr(leaf, "main_grad_stale") for leaf in leaves)
    else:
        assert dw13 is None
        assert not w13.main_grad_stale, "it counts from now on"
        assert w2.main_grad_stale, "nothing came"


def strided_like(weight: torch.Tensor) -> torch.Tensor:
    return cuda(*weight.mT.shape, dtype=torch.float32).mT


@pytest.mark.parametrize("name", ["w13_e2FD", "w2_eDF"])
@pytest.mark.parametrize(
    ("accumulator", "told"),
    [
        (lambda w: cuda(*w.shape), "contiguous torch.float32 main_grad.*found torch.bfloat16"),
        (lambda w: cuda(*w.shape, dtype=torch.float64), "contiguous torch.float32 main_grad.*found torch.float64"),
        (strided_like, "contiguous torch.float32 main_grad.*found torch.float32 with strides"),
        (lambda w: cuda(w.numel() + 2, dtype=torch.float32)[2:].view(w.shape), "multiple of 16 bytes.*from element 2"),
        (lambda w: cuda(1, *w.shape[1:], dtype=torch.float32), "main_grad .* found \\(1, "),
        (lambda w: torch.empty(w.shape), "main_grad .* on cuda:0, found .* on cpu"),
        (lambda w: torch.empty(w.shape, device="cuda:1"), "main_grad .* on cuda:0, found .* on cuda:1"),
    ],
    ids=["bfloat16", "float64", "strided", "between_16_bytes", "shape", "cpu", "other_gpu"],
)
def test_a_wrong_main_grad_is_refused(name: str, accumulator: Any, told: str) -> None:
    """Kernels write to its address: a wrong one would be written past its end, or in a wrong order."""
    with FakeTensorMode():
        arguments = fake_arguments()
        for weight in (arguments["w13_e2FD"], arguments["w2_eDF"]):
            weight.requires_grad_()
        arguments[name].main_grad = accumulator(arguments[name])
        out = experts(**arguments)
        with pytest.raises(ShapeError, match=told) as caught:
            out.grad_fn.apply(torch.empty_like(out), None)
    assert "allocate it with torch.empty_like(weight, dtype=torch.float32)" in str(caught.value)


REFERENCE = "set runtime.kernels = 'reference'"


def index_moved(name: str, device: str) -> RowIndex:
    index = fake_index(20, 6, 2)
    there = torch.empty(getattr(index, name).shape, dtype=torch.int32, device=device)
    return index._replace(**{name: there})


def many_tokens(tokens: int, hidden: int = 24) -> dict[str, Any]:
    index, gate = fake_index(tokens, 6, 2), cuda(tokens, 2, dtype=torch.float32)
    weights = {"w13_e2FD": cuda(6, 2, hidden, 16), "w2_eDF": cuda(6, 16, hidden)}
    return {"x_TD": cuda(tokens, 16), "index": index, "gate_TK": gate, **weights}


def no_width(width: int, hidden: int) -> dict[str, Any]:
    return {"x_TD": cuda(20, width), "w13_e2FD": cuda(6, 2, hidden, width), "w2_eDF": cuda(6, width, hidden)}


@pytest.mark.parametrize(
    ("changes", "told", "remedy"),
    [
        (lambda: {"x_TD": torch.empty(20, 16, dtype=torch.bfloat16)}, "x .*CUDA device; found.*cpu", REFERENCE),
        (lambda: {"x_TD": cuda(20, 16, dtype=torch.float32)}, "x .*bfloat16.*found.*float32", REFERENCE),
        (lambda: {"x_TD": cuda(16, 20).T}, "x .*contiguous.*found.*strided", REFERENCE),
        (lambda: {"x_TD": cuda(20, 32)[:, ::2]}, "x .*contiguous.*found.*strided", REFERENCE),
        (lambda: {"x_TD": cuda(2, 10, 16)}, "x \\(T, D\\).*found \\(2, 10, 16\\)", REFERENCE),
        (lambda: {"w13_e2FD": cuda(6, 2, 24, 16, dtype=torch.float32)}, "w13.*bfloat16.*float32", REFERENCE),
        (lambda: {"w13_e2FD": cuda(6, 2, 16, 24).mT}, "w13.*contiguous.*found.*strided", REFERENCE),
        (lambda: {"w2_eDF": cuda(6, 24, 16).mT}, "w2.*contiguous.*found.*strided", REFERENCE),
        (lambda: {"w2_eDF": cuda(6, 16, 24, dtype=torch.float16)}, "w2.*bfloat16.*float16", REFERENCE),
        (lambda: {"x_TD": cuda(20, 24)}, "x \\(T, D\\).*found \\(20, 24\\)", "use the same widths"),
        (lambda: {"w13_e2FD": cuda(6, 3, 24, 16)}, "found.*\\(6, 3, 24, 16\\)", "use the same widths"),
        (lambda: {"w2_eDF": cuda(5, 16, 24)}, "found.*\\(5, 16, 24\\)", "use the same widths"),
        (lambda: {"w2_eDF": cuda(6, 24, 16)}, "found.*\\(6, 24, 16\\)", "use the same widths"),
        (
            lambda: {"x_TD": cuda(20, 12), "w13_e2FD": cuda(6, 2, 24, 12), "w2_eDF": cuda(6, 12, 24)},
            "multiples of 8, found e = 6, D = 12 and F = 24",
            "round them up, or " + REFERENCE,
        ),
        (
            lambda: {"w13_e2FD": cuda(6, 2, 23, 16), "w2_eDF": cuda(6, 16, 23)},
            "multiples of 8, found e = 6, D = 16 and F = 23",
            "round them up, or " + REFERENCE,
        ),
        (lambda: {"index": fake_index(20, 7, 2)}, "index of 6 experts, found one of 7", "for the experts of these"),
        (lambda: {"index": fake_index(20, 6, 3)}, "\\(20, 3\\) and \\(20, 2\\)", "gates that came with the index"),
        (lambda: {"x_TD": cuda(19, 16)}, "T = 19; found \\(20, 2\\)", "gates that came with the index"),
        (lambda: {"gate_TK": cuda(20, 2)}, "fp32 gates.*bfloat16", "gates that came with the index"),
        (lambda: no_width(0, 24), "found e = 6, D = 0 and F = 24", "round them up, or " + REFERENCE),
        (lambda: no_width(16, 0), "found e = 6, D = 16 and F = 0", "round them up, or " + REFERENCE),
        (
            lambda: {"w13_e2FD": cuda(0, 2, 24, 16), "w2_eDF": cuda(0, 16, 24)},
            "expected experts, and widths .* found e = 0, D = 16 and F = 24",
            "round them up, or " + REFERENCE,
        ),
        (lambda: {"gate_TK": torch.empty(20, 2)}, "on cuda:0, found \\['cpu', 'cuda:0'\\]", "move them there"),
        *(
            ((lambda name=name: {"index": index_moved(name, "cpu")}), "found \\['cpu', 'cuda:0'\\]", "move them there")
            for name in RowIndex._fields
        ),
        (
            lambda: {"w2_eDF": torch.empty(6, 16, 24, dtype=torch.bfloat16, device="cuda:1")},
            "on cuda:0, found \\['cuda:0', 'cuda:1'\\]",
            "move them there",
        ),
        (
            lambda: {"x_TD": torch.empty(20, 16, dtype=torch.bfloat16, device="cuda:1")},
            "on cuda:1, found \\['cuda:0', 'cuda:1'\\]",
            "move them there",
        ),
        (lambda: many_tokens(1 << 27), "T·D < 2\\^31 .*found T·D = 2147483648 ", "smaller batches"),
        (lambda: many_tokens(1 << 20, hidden=1 << 13), "T·K·F < 2\\^34, .*T·K·F = 17179869184:", "smaller batches"),
    ],
)
def test_refusals(changes: Any, told: str, remedy: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told) as caught:
        experts(**fake_arguments(**changes()))
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("tokens", "hidden"), [((1 << 27) - 1, 24), ((1 << 20) - 1, 1 << 13)], ids=["T·D", "T·K·F"])
def test_the_most_tokens_are_accepted(tokens: int, hidden: int) -> None:
    with FakeTensorMode():
        assert experts(**fake_arguments(**many_tokens(tokens, hidden))).shape == (tokens, 16)
