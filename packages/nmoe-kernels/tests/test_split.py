"""An fp32 matrix as two bf16 ones: refusals without a GPU; values on one (`-m gpu`)."""

from functools import partial
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native.split_cuda import split

cuda = partial(torch.empty, device="cuda")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.empty(4, 3), r"\(4, 3\) of torch.float32 on cpu"),
        (lambda: torch.empty(4, 3, device="meta"), r"\(4, 3\) of torch.float32 on meta"),
        (lambda: cuda(4, 3, dtype=torch.bfloat16), r"\(4, 3\) of torch.bfloat16 on cuda"),
        (lambda: cuda(4, 3, dtype=torch.float64), r"\(4, 3\) of torch.float64 on cuda"),
        (lambda: cuda(12), r"\(12,\) of torch.float32"),
        (lambda: cuda(2, 2, 3), r"\(2, 2, 3\) of torch.float32"),
        (lambda: cuda(3, 4).t(), r"\(4, 3\) of torch.float32"),
        (lambda: cuda(4, 6)[:, ::2], r"\(4, 3\) of torch.float32"),
        (lambda: cuda(1 << 16, 1 << 16), r"\(65536, 65536\) of torch.float32"),
    ],
    ids=["cpu", "meta", "bfloat16", "float64", "vector", "three_dims", "transposed", "every_other", "2^32"],
)
def test_refusals(make: Any, found: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=f"contiguous fp32 matrix.*found {found}.*: convert or"):
        split(make())


def draw(rows: int, columns: int, exponent: int = 0) -> torch.Tensor:
    """Random numbers of both signs with a zero now and then, times powers of two from -exponent to exponent."""
    wide = torch.randn(rows, columns) * 2.0 ** torch.randint(-exponent, exponent + 1, (rows, columns))
    return wide * (torch.rand(rows, columns) < 0.99)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [0, 60], ids=["near", "far"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 3), (333, 3), (85, 3), (255, 1), (1, 257), (77, 64), (1000, 65), (4097, 128), (128, 4096)],
)
def test_parts_sum_to_the_whole(gpu: str, rows: int, columns: int, exponent: int) -> None:
    """Within 2^-17 of each element; each part is what bf16's rounding gives, and stands beside its own row's other."""
    wide = draw(rows, columns, exponent)
    parts = split(wide.to(gpu))
    assert (parts.shape, parts.dtype, parts.is_contiguous()) == ((rows, 2, columns), torch.bfloat16, True)
    parts = parts.cpu()
    high = wide.bfloat16()
    assert torch.equal(parts[:, 0], high)
    assert torch.equal(parts[:, 1], (wide - high.float()).bfloat16())
    left = parts.double().sum(1) - wide.double()
    assert (left.abs() <= 2.0**-17 * wide.double().abs()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_nothing(gpu: str, shape: tuple[int, int]) -> None:
    assert split(torch.empty(shape, device=gpu)).shape == (shape[0], 2, shape[1])


@pytest.mark.gpu
def test_a_view_that_starts_at_any_word(gpu: str) -> None:
    """And what stands before and after it is not taken for it."""
    whole = draw(40, 3)
    assert torch.equal(split(whole.to(gpu)[7:31]), split(whole[7:31].to(gpu)))


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements(gpu: str) -> None:
    """The last rows are found, and written where they belong: their own numbers pass 2^31, their parts' 2^32."""
    columns = 96
    rows = (1 << 31) // columns + 100
    wide = torch.empty(rows, columns, device=gpu)
    tail = draw(64, columns)
    wide[-64:] = tail
    found = split(wide)[-64:].cpu()
    assert torch.equal(found[:, 0], tail.bfloat16())
    assert torch.equal(found[:, 1], (tail - tail.bfloat16().float()).bfloat16())


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    """A replay sees the numbers of its time."""
    wide = torch.zeros(333, 3, device=gpu)
    split(wide)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = split(wide)
    wide.copy_(draw(333, 3))
    graph.replay()
    assert torch.equal(parts, split(wide))
    assert parts.any()
