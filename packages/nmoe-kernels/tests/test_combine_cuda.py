"""The combine in CUDA: refusals and shapes without a GPU; values on one (`-m gpu`)."""

import functools
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native.combine_cuda import combine, combine_backward, sum_partials

# --- without a GPU ---------------------------------------------------------------------------------------------------

cuda = functools.partial(torch.empty, device="cuda")
rows = functools.partial(cuda, dtype=torch.int32)
bf16 = functools.partial(cuda, dtype=torch.bfloat16)


def test_fake_shapes() -> None:
    with FakeTensorMode():
        out = combine(bf16(60, 16), rows(20, 3))
        dgate = sum_partials(cuda(5, 60), rows(20, 3))
        both = combine_backward(bf16(60, 16), rows(20, 3), cuda(5, 60))
    assert (out.shape, out.dtype) == ((20, 16), torch.bfloat16)
    assert (dgate.shape, dgate.dtype) == ((20, 3), torch.float32)
    assert [(x.shape, x.dtype) for x in both] == [(x.shape, x.dtype) for x in (out, dgate)]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: combine(bf16(6, 8).cpu(), torch.empty(2, 3, dtype=torch.int32)), "CUDA device.*found.*cpu"),
        (lambda: combine(bf16(6, 8), rows(2, 3).long()), "int32.*found.*int64"),
        (lambda: combine(bf16(6, 8), rows(3, 2).T), "contiguous.*found.*strided"),
        (lambda: combine(cuda(6, 8), rows(2, 3)), "bfloat16.*found.*float32"),
        (lambda: combine(bf16(8, 6).T, rows(2, 3)), "contiguous.*found.*strided"),
        (lambda: combine(bf16(6, 12), rows(2, 3)), "multiple of 8, found 12"),
        (lambda: combine(bf16(7, 8), rows(2, 3)), "R = 6.*found 7"),
        (lambda: combine(bf16(0, 8), rows(2, 0)), "K ≥ 1"),
        (lambda: combine(bf16(1 << 30, 64), rows(1 << 30, 1)), "T·D < 2\\^34"),
        (lambda: sum_partials(cuda(4, 6).double(), rows(2, 3)), "float32.*found.*float64"),
        (lambda: sum_partials(cuda(4, 7), rows(2, 3)), "R = 6.*found 7"),
        (lambda: sum_partials(cuda(6, 4).T, rows(2, 3)), "contiguous.*found.*strided"),
        (lambda: combine_backward(bf16(6, 8), rows(2, 3), cuda(4, 7)), "R = 6.*found 7"),
        (lambda: combine_backward(bf16(6, 12), rows(2, 3), cuda(4, 6)), "multiple of 8, found 12"),
    ],
)
def test_refusals(call: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        call()


# --- on one ----------------------------------------------------------------------------------------------------------

# T, D, K, N: the least, around one batch of eight loads, more than a batch, and what training has.
SHAPES = [(1, 8, 1, 1), (100, 64, 7, 2), (33, 776, 8, 3), (257, 40, 9, 5), (50, 128, 32, 1), (3000, 768, 8, 6)]


def draw(n_tokens: int, width: int, top_k: int, n_partials: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows = n_tokens * top_k
    y = (torch.randn(n_rows, width) * 10.0 ** torch.randint(-2, 3, (n_rows, 1))).bfloat16()  # so that order shows
    row = torch.randperm(n_rows).view(n_tokens, top_k).int()
    return y, row, torch.randn(n_partials, n_rows) * 10.0 ** torch.randint(-2, 3, (n_partials, 1))


def slot_sum(y_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """In slot order in fp32, rounded once."""
    out = torch.zeros(row_TK.shape[0], y_RD.shape[1])
    for slot in range(row_TK.shape[1]):
        out += y_RD[row_TK[:, slot].long()].float()
    return out.bfloat16()


def partial_sum(partial_NR: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(partial_NR.shape[1])
    for partial in partial_NR:
        total += partial
    return total[row_TK.long()]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_the_references_bit_for_bit(gpu: str, shape: tuple[int, int, int, int]) -> None:
    """Additions in a fixed order leave no freedom. Sums in another order differ, so that the test sees the order."""
    y, row, partial = draw(*shape)
    there = [x.to(gpu) for x in (y, row, partial)]
    out, dgate = slot_sum(y, row), partial_sum(partial, row)
    assert torch.equal(combine(there[0], there[1]).cpu(), out)
    assert torch.equal(sum_partials(there[2], there[1]).cpu(), dgate)
    both = combine_backward(*there)
    assert torch.equal(both[0].cpu(), out)
    assert torch.equal(both[1].cpu(), dgate)


def test_the_oracle_sees_the_order() -> None:
    y, row, partial = draw(3000, 768, 8, 6)
    assert not torch.equal(slot_sum(y, row), slot_sum(y, row.flip(1)))
    assert not torch.equal(partial_sum(partial, row), partial_sum(partial.flip(0), row))


@pytest.mark.gpu
def test_values_at_the_edges_of_bf16(gpu: str) -> None:
    """One row each: infinities, NaN, zeros of both signs and subnormals come through as additions to 0 leave them."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 8)
    row = torch.arange(numbers.shape[0], dtype=torch.int32)[:, None]
    found = combine(numbers.to(gpu), row.to(gpu)).cpu()
    torch.testing.assert_close(found, slot_sum(numbers, row), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_a_sum_between_two_bf16_goes_to_the_even_one(gpu: str) -> None:
    one = torch.tensor([1.0, 1.0 + 2**-7, -1.0, -1.0 - 2**-7, 1.0, 1.0, 1.0, 1.0])
    half = torch.tensor([2**-8, 2**-8, -(2**-8), -(2**-8), 2**-8 + 2**-15, 2**-8 - 2**-16, 2**-7, 2**-9])
    y = torch.stack((one, half)).bfloat16()
    row = torch.tensor([[0, 1]], dtype=torch.int32)
    expected = [1.0, 1.0 + 2**-6, -1.0, -1.0 - 2**-6, 1.0 + 2**-7, 1.0, 1.0 + 2**-7, 1.0]
    assert combine(y.to(gpu), row.to(gpu)).cpu()[0].tolist() == expected


@pytest.mark.gpu
def test_no_tokens(gpu: str) -> None:
    row = torch.empty(0, 3, dtype=torch.int32, device=gpu)
    out, dgate = combine_backward(
        torch.empty(0, 16, dtype=torch.bfloat16, device=gpu), row, torch.empty(4, 0, device=gpu)
    )
    assert (out.shape, dgate.shape) == ((0, 16), (0, 3))


@pytest.mark.gpu
def test_no_partials_sum_to_zero(gpu: str) -> None:
    row = torch.arange(6, dtype=torch.int32, device=gpu).view(2, 3)
    assert not sum_partials(torch.empty(0, 6, device=gpu), row).any()


@pytest.mark.gpu
def test_rows_off_by_half_a_piece_are_refused(gpu: str) -> None:
    y = torch.zeros(6 * 8 + 4, dtype=torch.bfloat16, device=gpu)[4:].view(6, 8)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        combine(y, torch.arange(6, dtype=torch.int32, device=gpu).view(2, 3))


@pytest.mark.gpu
def test_bits_do_not_change_between_runs(gpu: str) -> None:
    arguments = [x.to(gpu) for x in draw(2000, 768, 8, 6)]
    first = combine_backward(*arguments)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(combine_backward(*arguments), first, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    y, row, partial = (x.to(gpu) for x in draw(500, 128, 6, 4))
    combine_backward(y, row, partial)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = combine_backward(y, row, partial)
    y.copy_(torch.randn_like(y))
    graph.replay()
    assert torch.equal(captured[0], combine(y, row))
    assert torch.equal(captured[1], sum_partials(partial, row))


@pytest.mark.gpu
def test_fake_shapes_are_the_real_ones(gpu: str) -> None:
    y, row, partial = (x.to(gpu) for x in draw(50, 64, 3, 2))
    for op, arguments in (
        (torch.ops.nmoe.combine.default, (y, row)),
        (torch.ops.nmoe.sum_partials.default, (partial, row)),
        (torch.ops.nmoe.combine_backward.default, (y, row, partial)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
