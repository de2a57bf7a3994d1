"""Newton-Schulz against the same polynomial applied to singular values in float64."""

import pytest
import torch
from nmoe.kernels.reference.newton_schulz import newton_schulz

SHAPES = [(8, 8), (5, 9), (9, 5), (1, 6), (6, 1)]


def by_singular_values(
    matrix: torch.Tensor, steps: int, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
) -> torch.Tensor:
    """`U p(…p(σ / ‖σ‖)) Vᵀ`: what the iteration does, without iterating on the matrix."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    sigma = sigma / (sigma.norm() + 1e-7)
    a, b, c = coefficients
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u @ torch.diag(sigma) @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_equals_the_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64) * 3
    found = newton_schulz(matrix, steps=steps)
    torch.testing.assert_close(found, by_singular_values(matrix, steps), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("steps", "coefficients"),
    [
        (4, (3.4445, -4.7750, 2.0315)),
        (6, (3.4445, -4.7750, 2.0315)),
        (5, (2.0315, -4.7750, 3.4445)),  # in the other order
        (5, (15 / 8, -10 / 8, 3 / 8)),  # the classical quintic
        (5, (1.5, -0.5, 0.0)),  # the classical cubic
    ],
)
def test_the_oracle_tells_mistakes_apart(steps: int, coefficients: tuple[float, float, float]) -> None:
    matrix = torch.randn(5, 9, dtype=torch.float64)
    found = newton_schulz(matrix, steps=5)
    assert (found - by_singular_values(matrix, steps, coefficients)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_singular_values_end_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Five steps take every singular value above 1e-2 of the norm to between 0.65 and 1.25."""
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    sigma = torch.linspace(0.02, 1.0, min(shape), dtype=torch.float64)
    matrix = u @ torch.diag(sigma / sigma.norm()) @ vh
    found = torch.linalg.svdvals(newton_schulz(matrix.to(dtype), steps=5))
    assert found.min() > 0.65
    assert found.max() < 1.25


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 3, 4, 6)])
def test_a_batch_equals_its_matrices_one_by_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64) * torch.rand(*shape[:-2], 1, 1, dtype=torch.float64)
    found = newton_schulz(matrices, steps=5)
    assert found.shape == matrices.shape
    for one, of_batch in zip(matrices.flatten(0, -3), found.flatten(0, -3), strict=True):
        torch.testing.assert_close(newton_schulz(one, steps=5), of_batch, rtol=0, atol=1e-12)


def test_tall_equals_wide_transposed() -> None:
    matrix = torch.randn(11, 4, dtype=torch.float64)
    tall, wide = (newton_schulz(m, steps=5) for m in (matrix, matrix.T))
    torch.testing.assert_close(tall, wide.T, rtol=0, atol=1e-12)


def test_the_gram_matrix_is_of_the_short_side(allocations) -> None:
    matrix = torch.randn(64, 3)
    with allocations:
        newton_schulz(matrix, steps=2)
    assert allocations.largest <= 64 * 3


def test_scale_of_the_input_is_divided_out() -> None:
    matrix = torch.randn(5, 7, dtype=torch.float64)
    first, second = (newton_schulz(m, steps=5) for m in (matrix, matrix * 1e3))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)  # but for eps = 1e-7 beside a norm of about 6


def test_zero_stays_zero_and_the_input_stays_as_it_is() -> None:
    assert not newton_schulz(torch.zeros(2, 3, 4), steps=5).any()
    matrix = torch.randn(3, 4)
    kept = matrix.clone()
    newton_schulz(matrix, steps=5)
    assert torch.equal(matrix, kept)


def test_bfloat16_follows_float64() -> None:
    """15 products of unit-sized matrices, each rounded by 2^-8: a tenth is generous, and a lost step errs by more."""
    matrix = torch.randn(24, 40, dtype=torch.float64)
    found = newton_schulz(matrix.bfloat16(), steps=5)
    assert found.dtype == torch.bfloat16
    exact = by_singular_values(matrix.bfloat16(), 5)
    assert (found.double() - exact).norm() < 0.1 * exact.norm()
