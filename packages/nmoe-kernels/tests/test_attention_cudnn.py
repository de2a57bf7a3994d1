"""Global attention: refusals without a GPU; on one, the same bits each time, in CUDA graphs and out of them.
Values are tested in test_native.py."""

import pytest
import torch
from nmoe.kernels.errors import ShapeError

pytest.importorskip("triton", reason="Triton is for Linux")

from nmoe.kernels.native.attention_cudnn import global_attention

SHAPES = [(2, 4, 1000, 192, 128), (4, 3, 2048, 64, 64), (2, 2, 257, 128, 128), (1, 2, 256, 48, 32)]
"""B, H, S, d, v"""


def draw(batch: int, heads: int, length: int, width: int, value: int) -> list[torch.Tensor]:
    """Queries, keys, values and an output's gradient, each heads beside each other in (B, S, H, ·)."""
    widths = (width, width, value, value)
    return [torch.randn(batch, length, heads, w, device="cuda").bfloat16().transpose(1, 2) for w in widths]


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = global_attention(*leaves, scale=0.1)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def test_other_numbers_are_refused() -> None:
    q = torch.randn(1, 2, 8, 64)
    with pytest.raises(ShapeError, match=r"torch\.float32.*runtime\.kernels = 'reference'"):
        global_attention(q, q, q, scale=1.0)


def test_widths_without_a_kernel_are_refused() -> None:
    q = torch.randn(1, 2, 64, 320).bfloat16()
    with pytest.raises(ShapeError, match=r"found 320 and 320.*runtime\.kernels = 'reference'"):
        global_attention(q, q, q, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_each_time(gpu: str, shape: tuple[int, ...]) -> None:
    inputs = draw(*shape)
    first = gradients(*inputs)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gradients(*inputs), first, strict=True))


@pytest.mark.gpu
def test_heads_lie_beside_each_other(gpu: str) -> None:
    for tensor in gradients(*draw(2, 4, 300, 192, 128)):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
def test_layouts_change_no_bit(gpu: str) -> None:
    """Dense heads, and a gradient that autograd expands from one number."""
    q, k, v, _ = draw(2, 4, 300, 128, 128)
    dout = torch.ones((), device=gpu, dtype=torch.bfloat16).expand_as(v)
    expected = gradients(q, k, v, dout.contiguous())
    found = gradients(q.contiguous(), k.contiguous(), v.contiguous(), dout)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    inputs = draw(2, 4, 512, 192, 128)
    expected = gradients(*inputs)
    static = [torch.zeros_like(x) for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(*static)
    for tensor, given in zip(static, inputs, strict=True):
        tensor.copy_(given)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
