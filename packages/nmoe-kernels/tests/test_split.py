"""An fp32 matrix as two or three bf16 ones: refusals without a GPU; values on one (`-m gpu`)."""

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
        split(make(), 2)


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_other_numbers_of_parts_are_refused(parts: int) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=f"expected 2 or 3 parts, found {parts}"):
        split(cuda(4, 3), parts)


def draw(rows: int, columns: int, exponent: int = 0) -> torch.Tensor:
    """Random numbers of both signs with a zero now and then, times powers of two from -exponent to exponent."""
    wide = torch.randn(rows, columns) * 2.0 ** torch.randint(-exponent, exponent + 1, (rows, columns))
    return wide * (torch.rand(rows, columns) < 0.99)


def rounded(wide: torch.Tensor, n: int) -> torch.Tensor:
    """(R, n, N): each part what bf16's rounding gives of what those before it left."""
    parts = []
    for _ in range(n):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1].float()
    return torch.stack(parts, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [0, 60], ids=["near", "far"])
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 3), (333, 3), (85, 3), (255, 1), (1, 257), (77, 64), (1000, 65), (4097, 128), (128, 4096)],
)
def test_parts_sum_to_the_whole(gpu: str, rows: int, columns: int, n: int, exponent: int) -> None:
    """Two within 2^-17 of each element; three exactly, for fp32's 24 bits are three times 8. Each part is what bf16's
    rounding gives, and stands beside its own row's others."""
    wide = draw(rows, columns, exponent)
    parts = split(wide.to(gpu), n)
    assert (parts.shape, parts.dtype, parts.is_contiguous()) == ((rows, n, columns), torch.bfloat16, True)
    parts = parts.cpu()
    assert torch.equal(parts, rounded(wide, n))
    left = parts.double().sum(1) - wide.double()
    assert (left.abs() <= (2.0**-17 * wide.double().abs() if n == 2 else 0)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
def test_values_at_the_edges_of_float32(gpu: str, n: int) -> None:
    """The least whose three parts are exact, those below, and what is, or rounds to, infinity."""
    tiny = torch.tensor([1.0 + 2.0**-23, 2.0 - 2.0**-23, 1.0 + 2.0**-9 + 2.0**-23]) * 2.0**-110
    below = torch.tensor([2.0**-126, 2.0**-133, 2.0**-149, -(2.0**-120) * 1.2345678])
    huge = torch.tensor([torch.finfo(torch.float32).max, -3.4e38, float("inf"), float("-inf"), float("nan"), -0.0])
    wide = torch.cat((tiny, below, huge))[None]
    found = split(wide.to(gpu), n).cpu()
    torch.testing.assert_close(found, rounded(wide, n), rtol=0, atol=0, equal_nan=True)
    assert found[0, 1:, -4:-1].isnan().all()
    assert n == 2 or torch.equal(found[0, :, :3].double().sum(0), tiny.double())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_nothing(gpu: str, shape: tuple[int, int], n: int) -> None:
    assert split(torch.empty(shape, device=gpu), n).shape == (shape[0], n, shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
def test_a_view_that_starts_at_any_word(gpu: str, n: int) -> None:
    """And what stands before and after it is not taken for it."""
    whole = draw(40, 3)
    assert torch.equal(split(whole.to(gpu)[7:31], n).cpu(), rounded(whole[7:31], n))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
def test_beyond_2_to_the_31_elements(gpu: str, n: int) -> None:
    """The last rows are found, and written where they belong: their own numbers pass 2^31, their parts' 2^32."""
    columns = 96
    rows = (1 << 31) // columns + 100
    wide = torch.empty(rows, columns, device=gpu)
    tail = draw(64, columns)
    wide[-64:] = tail
    assert torch.equal(split(wide, n)[-64:].cpu(), rounded(tail, n))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [2, 3])
def test_in_a_cuda_graph(gpu: str, n: int) -> None:
    """A replay sees the numbers of its time."""
    wide = torch.zeros(333, 3, device=gpu)
    split(wide, n)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = split(wide, n)
    wide.copy_(draw(333, 3))
    graph.replay()
    assert torch.equal(parts, split(wide, n))
    assert parts.any()
