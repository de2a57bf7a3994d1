"""fp32 masters in bf16 and 16 bits: nothing is lost, for any exponent and any lower half."""

import numpy as np
import pytest
import torch
from nmoe.kernels.reference.master import join_master, split_master

SPLIT_POINTS = [0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
"""Lower halves around both ends and the rounding border."""

UPPERS = [0x0000, 0x8000, 0x0001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x4049, 0xC2FF, 0x7F7F, 0xFF7F, 0x7EFF, 0x0100]
"""Zeros of both signs, denormals, one, minus one, odd and even mantissas, the largest finite values."""


def floats(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(np.uint32).view(np.float32))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


def every_upper_with_each_split_point() -> torch.Tensor:
    upper, lower = np.meshgrid(np.arange(1 << 16, dtype=np.uint32), SPLIT_POINTS)
    patterns = (upper << 16 | lower).ravel().astype(np.uint32)
    return floats(patterns[(patterns >> 23 & 0xFF) != 0xFF])  # finite ones


def every_lower_half() -> torch.Tensor:
    upper, lower = np.meshgrid(np.array(UPPERS, dtype=np.uint32), np.arange(1 << 16, dtype=np.uint32))
    return floats((upper << 16 | lower).ravel())


@pytest.mark.parametrize("masters", [every_upper_with_each_split_point, every_lower_half])
def test_bit_for_bit(masters) -> None:
    master = masters()
    weight, residual = split_master(master)
    assert weight.dtype == torch.bfloat16
    assert residual.dtype == torch.int16
    assert torch.equal(bits(join_master(weight, residual)), bits(master))


@pytest.mark.parametrize("masters", [every_upper_with_each_split_point, every_lower_half])
def test_the_weight_is_the_nearest_bfloat16(masters) -> None:
    """PyTorch's conversion, but for the exact halfway cases, which go away from zero instead of to even."""
    master = masters()
    weight, _ = split_master(master)
    halfway = (bits(master) & 0xFFFF) == 0x8000
    plain = master.bfloat16()
    assert torch.equal(weight.view(torch.int16)[~halfway], plain.view(torch.int16)[~halfway])
    upwards = (bits(master[halfway]) >> 16) + 1
    assert torch.equal(weight.view(torch.int16)[halfway].to(torch.int32), upwards.to(torch.int16).to(torch.int32))


def test_rounding_to_even_would_not_fit() -> None:
    """Why halfway cases round up: to even, residuals would be -32768 and +32768, one value more than int16 has."""
    master = every_lower_half()
    even = master.bfloat16().view(torch.int16).to(torch.int32)
    residual = bits(master) - (even << 16)
    assert residual.max() == 1 << 15
    assert residual.min() == -(1 << 15)


def test_truncation_is_told_apart() -> None:
    """The other plausible split, the upper half cut off, is not the nearest bf16."""
    master = torch.tensor([1.0 + 3 * 2**-9])
    cut = (bits(master) >> 16 << 16).view(torch.float32)
    weight, _ = split_master(master)
    assert (weight.float() - master).abs() < (cut - master).abs()


def test_strided_masters() -> None:
    master = torch.randn(6, 8).t()
    weight, residual = split_master(master)
    assert torch.equal(join_master(weight, residual), master)
