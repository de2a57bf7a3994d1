"""Rotary position embedding (arXiv:2104.09864), interleaved pairs, with YaRN (arXiv:2309.00071) as DeepSeek-V3 uses it.

Shapes: S positions, d head width that is turned.
"""

import math

import torch


def rope_frequencies(dim: int, theta: float, device: torch.device | str | None = None) -> torch.Tensor:
    """Angle per position of each of the `dim / 2` pairs, fp32: `theta^(-2i/dim)`, rounded as the released models do."""
    # One rounding apart is 0.01 rad at position 100 000: hence the reciprocal of the power, not the negative power.
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def yarn_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_seq_len: int,
    beta_fast: float,
    beta_slow: float,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """YaRN's frequencies ("NTK-by-parts", section 3.2), fp32 (dim / 2).

    A pair that turns more than `beta_fast` times over the original context keeps its frequency; one that turns less
    than `beta_slow` times is divided by `factor`; between the two (in pair index, rounded outwards) linear.
    """

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(original_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # one pair at the border: a step, not a division by zero
    pair = torch.arange(dim // 2, dtype=torch.float32, device=device)
    interpolated = ((pair - low) / width).clamp(0, 1)
    frequency = rope_frequencies(dim, theta, device)
    return frequency / factor * interpolated + frequency * (1 - interpolated)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature `0.1 · mscale · ln(factor) + 1`; 1 where nothing is extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_tables(
    positions_S: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each fp32 (S, d/2), for integer positions; `scale` multiplies both (YaRN's mscale ratio)."""
    angle = positions_S.to(torch.float32)[:, None] * frequencies
    return angle.cos() * scale, angle.sin() * scale


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x[2i], x[2i+1]) of the last dimension by their angles, in fp32 or wider.

    Args:
        x: (…, S, d).
        cos: (S, d/2).
        sin: (S, d/2).

    Returns:
        (…, S, d) of x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).contiguous()
    turned = torch.view_as_complex(wide) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rope(x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` of heads in the order that projections give: x (B, S, H, d), cos and sin (S, d/2), to x's shape."""
    return apply_rope(x_BSHd.transpose(1, 2), cos, sin).transpose(1, 2)
