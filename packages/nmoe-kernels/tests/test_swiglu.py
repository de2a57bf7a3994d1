"""SwiGLU and its hand-derived backward against the formula in float64 and finite differences."""

import math

import pytest
import torch
from nmoe.kernels.reference.swiglu import swiglu, swiglu_backward, swiglu_forward


def naive(pre: torch.Tensor) -> torch.Tensor:
    half = pre.shape[-1] // 2
    rows = [
        [row[i] / (1 + math.exp(-row[i])) * row[half + i] for i in range(half)]
        for row in pre.double().reshape(-1, 2 * half).tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64).view(*pre.shape[:-1], half)


def test_equals_the_formula() -> None:
    pre = torch.randn(3, 4, 10, dtype=torch.float64) * 3
    torch.testing.assert_close(swiglu(pre), naive(pre), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(swiglu_forward(pre), naive(pre), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: naive(x.roll(5, -1)),  # gate and up swapped
        lambda x: naive(x.unflatten(-1, (5, 2)).transpose(-1, -2).flatten(-2)),  # gate and up interleaved
        lambda x: x[..., :5].sigmoid() * x[..., 5:],  # GLU
        lambda x: torch.nn.functional.gelu(x[..., :5]) * x[..., 5:],  # GEGLU
    ],
    ids=["swapped", "interleaved", "glu", "geglu"],
)
def test_the_formula_tells_mistakes_apart(mistake) -> None:
    pre = torch.randn(4, 10, dtype=torch.float64)
    assert (mistake(pre) - swiglu(pre)).abs().max() > 1e-2


def test_gradient_by_finite_differences() -> None:
    pre = (torch.randn(4, 6, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (pre,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3 * 2**-8)])
def test_backward_equals_autograd_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    """Three roundings lie between inputs and each gradient: of two products and of the derivative."""
    pre, dout = torch.randn(64, 20).to(dtype), torch.randn(64, 10).to(dtype)
    exact = pre.double().requires_grad_()
    (torch.nn.functional.silu(exact[:, :10]) * exact[:, 10:]).backward(dout.double())
    found = swiglu_backward(dout, pre)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.grad, rtol=tolerance, atol=tolerance / 10)


def test_keeps_the_pre_activation_and_nothing_else() -> None:
    kept = []
    pre = torch.randn(4, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(pre)
    assert [x.data_ptr() for x in kept] == [pre.data_ptr()]
