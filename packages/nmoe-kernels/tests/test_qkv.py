"""Plain attention's heads, put together one number at a time with complex phases; gradients by finite differences."""

import cmath
import math
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.qkv import qkv_heads

BATCH, LENGTH, HEADS, WIDTH, EPS = 2, 3, 3, 6, 1e-2


def draw(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """qkv and both gains; cos and sin, a little longer than one as YaRN's are, and wide in every test of values."""
    qkv = torch.randn(BATCH, LENGTH, 3, HEADS, WIDTH, dtype=torch.float64)
    gains = [1 + 0.3 * torch.randn(WIDTH, dtype=torch.float64) for _ in range(2)]
    angle = torch.rand(LENGTH, WIDTH // 2, dtype=torch.float64) * 6
    return [*(tensor.to(dtype) for tensor in (qkv, *gains)), 1.1 * angle.cos(), 1.1 * angle.sin()]


def heads(qkv: torch.Tensor, q_gain: torch.Tensor, k_gain: torch.Tensor, *tables: torch.Tensor) -> Any:
    return qkv_heads(qkv, (q_gain, k_gain), EPS, *tables)


def naive(qkv: Any, q_gain: Any, k_gain: Any, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    out = [torch.zeros(BATCH, HEADS, LENGTH, WIDTH, dtype=torch.float64) for _ in range(3)]
    for b in range(BATCH):
        for s in range(LENGTH):
            for h in range(HEADS):
                out[2][b, h, s] = qkv[b, s, 2, h]
                for part, gain in ((0, q_gain), (1, k_gain)):
                    head = qkv[b, s, part, h].tolist()
                    if gain is not None:
                        scale = 1 / math.sqrt(sum(number**2 for number in head) / WIDTH + EPS)
                        head = [number * scale * float(weight) for number, weight in zip(head, gain, strict=True)]
                    for i in range(WIDTH // 2):
                        turned = complex(*head[2 * i : 2 * i + 2]) * complex(cos[s, i], sin[s, i])
                        length, angle = cmath.polar(turned)
                        out[part][b, h, s, 2 * i] = length * math.cos(angle)
                        out[part][b, h, s, 2 * i + 1] = length * math.sin(angle)
    return out


def worst(found: Any, expected: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_equals_the_definition() -> None:
    case = draw()
    assert worst(heads(*case), naive(*case)) < 1e-14
    qkv, _, _, *tables = case
    assert worst(qkv_heads(qkv, None, EPS, *tables), naive(qkv, None, None, *tables)) < 1e-14


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, q, k, c, s: (x, q, k, c, -s),
        lambda x, q, k, c, s: (x, q, k, s, c),
        lambda x, q, k, c, s: (x, q, k, c.roll(1, 0), s.roll(1, 0)),
        lambda x, q, k, c, s: (x[..., [0, 3, 1, 4, 2, 5]], q, k, c, s),
        lambda x, q, k, c, s: (x.roll(1, 2), q, k, c, s),
        lambda x, q, k, c, s: (x, k, q, c, s),
        lambda x, q, k, c, s: (x, None, None, c, s),
        lambda x, q, k, c, s: (2 * x, q, k, c, s),
    ],
    ids=["backwards", "cos_sin", "next_position", "halves", "parts", "gains_exchanged", "no_norm", "eps"],
)
def test_the_oracle_tells_mistakes_apart(mistake: Any) -> None:
    case = draw()
    assert worst(heads(*case)[:2], naive(*mistake(*case))[:2]) > 1e-3


def test_gradients_by_finite_differences() -> None:
    *inputs, cos, sin = draw()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *tensors: heads(*tensors, cos, sin), leaves)
    assert torch.autograd.gradcheck(lambda qkv: qkv_heads(qkv, None, EPS, cos, sin), leaves[:1])


def test_values_are_a_view() -> None:
    qkv, *rest = draw()
    v_BHSd = heads(qkv, *rest)[2]
    qkv += 1
    assert torch.equal(v_BHSd, qkv[:, :, 2].transpose(1, 2))


def test_narrow_numbers_are_normed_and_turned_in_float32() -> None:
    """In bf16: one rounding after the norm, of which a turn takes two numbers, and one after the turn."""
    *inputs, cos, sin = draw(torch.bfloat16)
    found = heads(*inputs, cos.float(), sin.float())
    exact = naive(*inputs, cos, sin)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found)
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert ((a.double() - b).abs() <= 2.0**-8 * b.abs() + 2 * 1.1 * 2.0**-8 * b.abs().max()).all()
    assert torch.equal(found[2].double(), exact[2])


SHAPES = {"qkv": (2, 3, 3, 4, 6), "q_gain": (6,), "k_gain": (6,), "cos": (3, 3), "sin": (3, 3)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qkv", (2, 3, 12, 6)),
        ("qkv", (2, 3, 2, 4, 6)),
        ("qkv", (2, 3, 3, 0, 6)),
        ("qkv", (2, 3, 3, 4, 7)),
        ("qkv", (2, 4, 3, 4, 6)),
        ("q_gain", (3,)),
        ("k_gain", (1, 6)),
        ("cos", (3, 6)),
        ("sin", (2, 3)),
    ],
)
def test_refuses_what_does_not_belong_together(name: str, shape: tuple[int, ...]) -> None:
    heads(*(torch.zeros(size) for size in SHAPES.values()))
    with pytest.raises(ShapeError, match=r"expected qkv \(B, S, 3, H, d\), gains \(d\) or none, .* found .*: use"):
        heads(*(torch.zeros(size) for size in (SHAPES | {name: shape}).values()))
