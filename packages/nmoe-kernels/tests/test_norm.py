"""RMSNorm, alone and after an addition, against its formula, written element by element in float64."""

import math

import pytest
import torch
from nmoe.kernels.reference.norm import add_rms_norm, rms_norm

EPS = 1e-6


def naive(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        mean_square = sum(value * value for value in row) / len(row)
        rows.append([value / math.sqrt(mean_square + eps) * w for value, w in zip(row, weight.tolist(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def small_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of about 1e-3, whose mean square is near the epsilon."""
    return torch.randn(3, 4, 10, dtype=torch.float64) * 1e-3, torch.randn(10, dtype=torch.float64)


def test_equals_the_formula_in_float64() -> None:
    x, weight = small_rows()
    torch.testing.assert_close(rms_norm(x, weight, EPS), naive(x, weight, EPS), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, w: naive(x, w, 1e-5),
        lambda x, w: naive(x, w, 1e-8),
        lambda x, w: naive(x, w, 0.0) / (1 + EPS),
        lambda x, w: naive(x, 1 + w, EPS),
        lambda x, w: naive(x - x.mean(-1, keepdim=True), w, EPS),  # LayerNorm's centring
        lambda x, w: naive(x, w, EPS) / math.sqrt(x.shape[-1]),  # sum for mean
    ],
    ids=["eps_1e-5", "eps_1e-8", "eps_outside", "gain_plus_one", "centred", "sum"],
)
def test_the_formula_tells_mistakes_apart(mistake) -> None:
    x, weight = small_rows()
    assert not torch.allclose(mistake(x, weight), rms_norm(x, weight, EPS), rtol=1e-6, atol=0)


def test_float32_errs_by_a_few_roundings() -> None:
    x, weight = torch.randn(5, 384), torch.randn(384)
    # One rounding each for the root, the quotient and the product, and a short tree for the mean.
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), naive(x, weight, EPS), rtol=8 * 2**-24, atol=0)


def test_bfloat16_takes_its_mean_in_float32() -> None:
    """4096 equal squares: a bf16 sum would stand still at 256 of them."""
    x = torch.full((1, 4096), 1.0).bfloat16()
    weight = torch.full((4096,), 1.5).bfloat16()
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.bfloat16
    # Normalised value and product are each rounded to 8 bits once.
    torch.testing.assert_close(out.double(), naive(x, weight.double(), EPS), rtol=2 * 2**-8, atol=0)


def test_gradients_by_finite_differences() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, EPS), (x, weight))


def test_addition_and_norm_are_those_of_one_after_the_other() -> None:
    """To the bit, in bf16 too: the norm is that of the rounded sum."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, delta, weight = (torch.randn(size).to(dtype) for size in ((3, 40), (3, 40), (40,)))
        total, normed = add_rms_norm(x, delta, weight, EPS)
        assert torch.equal(total, x + delta)
        assert torch.equal(normed, rms_norm(x + delta, weight, EPS))
        total, normed = add_rms_norm(x, None, weight, EPS)
        assert torch.equal(total, x)
        assert torch.equal(normed, rms_norm(x, weight, EPS))


def test_gradients_through_addition_and_norm_by_finite_differences() -> None:
    x, delta = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, w: add_rms_norm(a, b, w, EPS), (x, delta, weight))
    assert torch.autograd.gradcheck(lambda a, w: add_rms_norm(a, None, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b, w: add_rms_norm(a, b, w, EPS)[1], (x, delta, weight))


def test_a_sum_whose_norm_leads_nowhere_hands_its_gradient_on() -> None:
    x, delta, weight = (torch.randn(size, requires_grad=True) for size in ((3, 5), (3, 5), (5,)))
    dtotal = torch.randn(3, 5)
    found = torch.autograd.grad(add_rms_norm(x, delta, weight, EPS)[0], (x, delta, weight), dtotal, allow_unused=True)
    assert torch.equal(found[0], dtotal)
    assert torch.equal(found[1], dtotal)
    assert found[2] is None


def test_both_gradients_meet_before_they_are_rounded() -> None:
    """In bf16, where two roundings would give other bits for some of 4000."""
    x, delta, weight = (torch.randn(size).bfloat16().requires_grad_() for size in ((40, 100), (40, 100), (100,)))
    dtotal, dout = (torch.randn(40, 100).bfloat16() for _ in range(2))
    found = torch.autograd.grad(add_rms_norm(x, delta, weight, EPS), (x, delta), (dtotal, dout))
    wide, gain = (x + delta).detach().double().requires_grad_(), weight.detach().double()
    (exact,) = torch.autograd.grad(rms_norm(wide, gain, EPS), wide, dout.double())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0].double(), exact + dtotal.double(), rtol=2.0**-8, atol=2.0**-20)
