"""Grouped products against row-by-row sums, with ragged and empty experts."""

import pytest
import torch
from nmoe.kernels.reference.grouped_gemm import grouped_gemm, grouped_wgrad

OFFSETS = {
    "ragged": [0, 3, 4, 9, 11],
    "empty": [0, 0, 5, 5, 5, 11, 11],
    "all_to_one": [0, 0, 11, 11],
    "no_rows": [0, 0, 0],
}


def draw(offsets: list[int], n: int = 5, m: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, experts = offsets[-1], len(offsets) - 1
    return (
        torch.randn(rows, n, dtype=torch.float64),
        torch.randn(experts, n, m, dtype=torch.float64),
        torch.tensor(offsets, dtype=torch.int32),
    )


def expert_of(row: int, offsets: list[int]) -> int:
    return next(e for e in range(len(offsets) - 1) if offsets[e] <= row < offsets[e + 1])


def naive_gemm(a: torch.Tensor, weight: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    out = torch.zeros(a.shape[0], weight.shape[2], dtype=torch.float64)
    for row in range(a.shape[0]):
        out[row] = (a[row, :, None] * weight[expert_of(row, offsets)]).sum(0)
    return out


def naive_wgrad(a: torch.Tensor, b: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    out = torch.zeros(len(offsets) - 1, a.shape[1], b.shape[1], dtype=torch.float64)
    for row in range(a.shape[0]):
        out[expert_of(row, offsets)] += a[row].double()[:, None] * b[row].double()
    return out


@pytest.mark.parametrize("case", OFFSETS)
def test_each_row_meets_its_experts_weight(case: str) -> None:
    a, weight, offset = draw(OFFSETS[case])
    expected = naive_gemm(a, weight, OFFSETS[case])
    torch.testing.assert_close(grouped_gemm(a, weight, offset), expected, rtol=1e-12, atol=1e-14)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(grouped_gemm(a, transposed, offset), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", OFFSETS)
def test_wgrad_adds_to_what_is_there(case: str) -> None:
    a, _, offset = draw(OFFSETS[case])
    b = torch.randn(a.shape[0], 3, dtype=torch.float64)
    before = torch.randn(len(OFFSETS[case]) - 1, 5, 3, dtype=torch.float64)
    into = before.clone()
    grouped_wgrad(a, b, offset, into, add=True)
    torch.testing.assert_close(into, before + naive_wgrad(a, b, OFFSETS[case]), rtol=1e-12, atol=1e-13)
    for expert, (start, end) in enumerate(zip(OFFSETS[case], OFFSETS[case][1:], strict=False)):
        assert start < end or torch.equal(into[expert], before[expert]), "an expert without rows keeps its bits"


@pytest.mark.parametrize("case", OFFSETS)
def test_wgrad_overwrites_what_is_there(case: str) -> None:
    """NaN included, which no factor of zero would remove; an expert without rows gets zeros."""
    a, _, offset = draw(OFFSETS[case])
    b = torch.randn(a.shape[0], 3, dtype=torch.float64)
    into = torch.full((len(OFFSETS[case]) - 1, 5, 3), float("nan"), dtype=torch.float64)
    grouped_wgrad(a, b, offset, into, add=False)
    torch.testing.assert_close(into, naive_wgrad(a, b, OFFSETS[case]), rtol=1e-12, atol=1e-13)
    for expert, (start, end) in enumerate(zip(OFFSETS[case], OFFSETS[case][1:], strict=False)):
        assert start < end or not into[expert].any()


def test_the_oracle_tells_shifted_offsets_apart() -> None:
    a, weight, offset = draw(OFFSETS["ragged"])
    shifted = [0, 4, 5, 10, 11]
    assert (grouped_gemm(a, weight, offset) - naive_gemm(a, weight, shifted)).abs().max() > 0.1


def test_a_wide_accumulator_gets_unrounded_products() -> None:
    """bf16 rows into fp32: what is added has fp32's precision, not bf16's (which would err by 2^-8)."""
    a, b = torch.randn(300, 6).bfloat16(), torch.randn(300, 4).bfloat16()
    offsets = [0, 100, 100, 300]
    into = torch.zeros(3, 6, 4)
    grouped_wgrad(a, b, torch.tensor(offsets, dtype=torch.int32), into, add=True)
    terms = naive_wgrad(a.abs(), b.abs(), offsets)
    # 200 fp32 additions err by at most 200 · 2^-24 of the sum of magnitudes.
    assert ((into.double() - naive_wgrad(a, b, offsets)).abs() <= 200 * 2**-24 * terms).all()
