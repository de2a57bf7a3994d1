"""A projection's product and gradients, and where its weight's gradient goes."""

import pytest
import torch
import torch.nn.functional as F
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.linear import linear


def draw(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    """x (2, 5, 6), weight (2, 4, 6), and the gradient of (2, 5, 8)."""
    x, weight, dout = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 5, 6), (2, 4, 6), (2, 5, 8)))
    return x.requires_grad_(), torch.nn.Parameter(weight), dout


def test_equals_a_plain_linear() -> None:
    x, weight, dout = draw(torch.float64)
    out = linear(x, weight)
    expected = F.linear(x, weight.flatten(0, 1))
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out, (x, weight), dout)
    for a, b in zip(found, torch.autograd.grad(expected, (x, weight), dout), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_check() -> None:
    x, weight, _ = draw(torch.float64)
    assert torch.autograd.gradcheck(linear, (x, weight))


def accumulate(device: str) -> None:
    """Two micro-batches into one accumulator: the first overwrites what is stale, and no sum is rounded to bf16."""
    x, weight, dout = draw(torch.bfloat16, device)
    weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan"), dtype=torch.float32), True
    for _ in range(2):
        linear(x, weight).backward(dout)
    assert weight.grad is None
    once = dout.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    torch.testing.assert_close(weight.main_grad.double().flatten(0, 1), 2 * once, rtol=1e-5, atol=1e-6)
    rounded = 2 * once.bfloat16().double()
    assert not torch.allclose(weight.main_grad.double().flatten(0, 1), rounded, rtol=1e-5, atol=1e-6)


def test_main_grad_is_written_then_added_to_in_fp32() -> None:
    accumulate("cpu")


@pytest.mark.gpu
def test_main_grad_on_a_gpu(gpu: str) -> None:
    accumulate(gpu)


def test_only_what_is_asked_for() -> None:
    x, weight, dout = draw(torch.float32)
    weight.requires_grad_(False)
    linear(x, weight).backward(dout)
    assert x.grad is not None
    assert weight.grad is None
    x, weight, dout = draw(torch.float32)
    linear(x.detach(), weight).backward(dout)
    assert weight.grad is not None


def test_an_expanded_gradient() -> None:
    x, weight, _ = draw(torch.float64)
    out = linear(x, weight)
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(2, 4, 6))


@pytest.mark.parametrize(
    ("x", "weight", "found"),
    [
        (
            torch.zeros(3, 5),
            torch.zeros(4, 6),
            r"found \(3, 5\) of torch\.float32 on cpu and \(4, 6\) of torch\.float32",
        ),
        (torch.zeros(3, 6), torch.zeros(4, 6).bfloat16(), r"\(3, 6\) of torch\.float32 .* \(4, 6\) of torch\.bfloat16"),
        (torch.zeros(3, 6), torch.zeros(4, 6, device="meta"), "on cpu and .* on meta"),
        (torch.zeros(()), torch.zeros(4, 6), r"found \(\) of"),
        (torch.zeros(3, 6), torch.zeros(6), r"and \(6,\) of"),
    ],
    ids=["width", "dtype", "device", "scalar", "vector"],
)
def test_what_does_not_belong_together_is_refused(x: torch.Tensor, weight: torch.Tensor, found: str) -> None:
    with pytest.raises(ShapeError, match=f"expected x .*{found}.*: convert x to what the weight takes"):
        linear(x, weight)
