"""RoPE as multiplication by complex phases, and YaRN's frequencies pair by pair from the papers' formulas."""

import cmath
import math

import pytest
import torch
from nmoe.kernels.reference.rope import (
    apply_rope,
    rope_frequencies,
    rope_tables,
    yarn_frequencies,
    yarn_mscale,
)

DEEPSEEK_V3 = {"factor": 40.0, "original_seq_len": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""With dim 64 and theta 10000."""


def naive_rope(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """Pair i of position p is the complex number x[2i] + j·x[2i+1], times exp(j·p·theta^(-2i/d))."""
    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-2])).reshape(-1, x.dim() - 2).tolist():
        for s, position in enumerate(positions):
            row = x[tuple(index)][s].tolist()
            for i in range(dim // 2):
                phase = cmath.exp(1j * position * theta ** (-2 * i / dim))
                turned = complex(row[2 * i], row[2 * i + 1]) * phase
                out[(*index, s, 2 * i)], out[(*index, s, 2 * i + 1)] = turned.real, turned.imag
    return out


def turn(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    return apply_rope(x, *rope_tables(torch.tensor(positions), rope_frequencies(x.shape[-1], theta)))


def test_pairs_are_turned_as_complex_numbers() -> None:
    x, positions = torch.randn(2, 3, 4, 8, dtype=torch.float64), [0, 1, 5, 40]
    # The tables are fp32: an angle of up to 40 is rounded by 2^-24 · 40.
    torch.testing.assert_close(turn(x, positions, 100.0), naive_rope(x, positions, 100.0), rtol=0, atol=2e-5)


def test_frequencies_fall_from_one_by_pairs() -> None:
    found = rope_frequencies(12, 10_000.0).double()
    expected = torch.tensor([10_000.0 ** (-2 * i / 12) for i in range(6)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 16, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    near = (turn(q, [7], 50.0) * turn(k, [3], 50.0)).sum()
    far = (turn(q, [107], 50.0) * turn(k, [103], 50.0)).sum()
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
    other = (turn(q, [107], 50.0) * turn(k, [102], 50.0)).sum()
    assert (near - other).abs() > 1e-2


def half_rotation(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """The other layout in use: x[i] is paired with x[i + d/2]."""
    to_pairs = torch.arange(x.shape[-1]).view(2, -1).t().flatten()
    return turn(x[..., to_pairs], positions, theta)[..., to_pairs.argsort()]


@pytest.mark.parametrize(
    "mistake",
    [
        half_rotation,
        lambda x, p, theta: turn(x, [-q for q in p], theta),
        lambda x, p, theta: turn(x, [q + 1 for q in p], theta),
        lambda x, p, theta: turn(x, p, theta**0.5),
        lambda x, p, theta: turn(x, p, theta) * 1.01,
    ],
    ids=["half_rotation", "backwards", "position_from_one", "exponent_i_over_d", "scaled"],
)
def test_the_oracle_tells_mistakes_apart(mistake) -> None:
    x, positions = torch.randn(1, 4, 8, dtype=torch.float64), [0, 1, 2, 3]
    assert (mistake(x, positions, 100.0) - naive_rope(x, positions, 100.0)).abs().max() > 1e-3


def test_bfloat16_is_turned_in_float32() -> None:
    x = torch.randn(2, 6, 16).bfloat16()
    found = turn(x, list(range(6)), 100.0)
    expected = naive_rope(x.double(), list(range(6)), 100.0)
    assert found.dtype == torch.bfloat16
    # One rounding to 8 bits at the end: bf16 products would err by more where a turn nearly cancels a coordinate.
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 2e-6).all()


def naive_yarn(dim: int, theta: float, factor: float, length: int, fast: float, slow: float) -> list[float]:
    """YaRN, section 3.2, with the ramp of the released code: linear in the pair's index, its ends rounded outwards."""
    frequency = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    # Rotations of pair i over the original context are length · frequency / 2π; solve for i.
    first = math.log(length / (2 * math.pi * fast)) / math.log(theta) * dim / 2
    last = math.log(length / (2 * math.pi * slow)) / math.log(theta) * dim / 2
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    out = []
    for i, f in enumerate(frequency):
        share = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
        out.append((1 - share) * f + share * f / factor)
    return out


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "length", "fast", "slow"),
    [
        (64, 10_000.0, 40.0, 4096, 32.0, 1.0),
        (64, 50_000.0, 4.0, 8192, 16.0, 2.0),
        (16, 10_000.0, 2.5, 64, 4.0, 1.0),
        (8, 100.0, 8.0, 32, 32.0, 1.0),  # no pair turns 32 times in 32 positions
    ],
)
def test_yarn_frequencies(dim: int, theta: float, factor: float, length: int, fast: float, slow: float) -> None:
    found = yarn_frequencies(dim, theta, factor=factor, original_seq_len=length, beta_fast=fast, beta_slow=slow)
    expected = torch.tensor(naive_yarn(dim, theta, factor, length, fast, slow), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain = rope_frequencies(64, 10_000.0)
    found = yarn_frequencies(64, 10_000.0, **DEEPSEEK_V3)
    rotations = 4096 * plain / (2 * math.pi)
    fast, slow = rotations >= 32, rotations <= 1
    assert fast.any()
    assert slow.any()
    torch.testing.assert_close(found[fast], plain[fast], rtol=0, atol=0)
    torch.testing.assert_close(found[slow], plain[slow] / 40, rtol=1e-6, atol=0)
    ratio = plain / found
    assert (ratio.diff() >= 0).all(), "the further from fast, the more is interpolated"
    assert ((ratio > 1.0001) & (ratio < 39.99)).sum() == 23 - 10 - 1, "pairs 11 to 22 lie between the borders 10 and 23"


@pytest.mark.parametrize(
    "change", [{"beta_fast": 31.0, "beta_slow": 0.5}, {"factor": 39.0}, {"original_seq_len": 2048}]
)
def test_yarn_oracle_tells_mistakes_apart(change: dict[str, float]) -> None:
    found = yarn_frequencies(64, 10_000.0, **(DEEPSEEK_V3 | change))
    expected = torch.tensor(naive_yarn(64, 10_000.0, 40.0, 4096, 32.0, 1.0))
    assert not torch.allclose(found, expected, rtol=1e-4, atol=0)


def test_yarn_with_one_border_is_a_step() -> None:
    """Equal betas whose border falls on a pair: a step, no division by zero."""
    # theta = e^(d/2) makes ln(length / 2π) the pair's index itself.
    theta, length = math.exp(4), 2 * math.pi * math.exp(2)
    found = yarn_frequencies(8, theta, factor=4.0, original_seq_len=length, beta_fast=1.0, beta_slow=1.0)
    assert found.isfinite().all()
    ratio = rope_frequencies(8, theta) / found
    assert all(min(abs(r - 1), abs(r - 4)) < 0.01 for r in ratio.tolist())


def test_mscale() -> None:
    assert yarn_mscale(40.0, 1.0) == pytest.approx(0.1 * math.log(40.0) + 1.0, rel=1e-15)
    assert yarn_mscale(40.0, 0.5) == pytest.approx(0.05 * math.log(40.0) + 1.0, rel=1e-15)
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0


def test_tables_carry_the_scale() -> None:
    frequencies = rope_frequencies(8, 100.0)
    cos, sin = rope_tables(torch.tensor([3, 9]), frequencies, 1.25)
    angle = torch.tensor([3.0, 9.0], dtype=torch.float64)[:, None] * frequencies.double()
    torch.testing.assert_close(cos.double(), 1.25 * angle.cos(), rtol=0, atol=2e-6)
    torch.testing.assert_close(sin.double(), 1.25 * angle.sin(), rtol=0, atol=2e-6)
