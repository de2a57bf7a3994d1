"""MLA's heads, put together one number at a time with complex phases; gradients by finite differences."""

import cmath
import dataclasses
from typing import Any

import pytest
import torch
from nmoe.kernels import selftest
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.mla import mla_heads
from nmoe.kernels.reference.rope import apply_rope

BATCH, LENGTH, HEADS, NOPE, ROPE, VALUE = 2, 3, 3, 5, 4, 2


def draw(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, kv, k_rope; cos and sin, a little longer than one as YaRN's are, and wide in every test of values."""
    sizes = ((HEADS, NOPE + ROPE), (HEADS, NOPE + VALUE), (ROPE,))
    inputs = [torch.randn(BATCH, LENGTH, *size, dtype=torch.float64).to(dtype) for size in sizes]
    angle = torch.rand(LENGTH, ROPE // 2, dtype=torch.float64) * 6
    return [*inputs, 1.1 * angle.cos(), 1.1 * angle.sin()]


def naive(q: torch.Tensor, kv: torch.Tensor, k_rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[Any]:
    q_out, k_out = (torch.zeros(BATCH, HEADS, LENGTH, NOPE + ROPE, dtype=torch.float64) for _ in range(2))
    v_out = torch.zeros(BATCH, HEADS, LENGTH, VALUE, dtype=torch.float64)
    for b in range(BATCH):
        for s in range(LENGTH):
            for h in range(HEADS):
                for i in range(NOPE):
                    q_out[b, h, s, i], k_out[b, h, s, i] = q[b, s, h, i], kv[b, s, h, i]
                for i in range(ROPE // 2):
                    at = NOPE + 2 * i
                    angle = cmath.phase(complex(cos[s, i], sin[s, i]))
                    turned = complex(q[b, s, h, at], q[b, s, h, at + 1]) * 1.1 * cmath.exp(1j * angle)
                    q_out[b, h, s, at], q_out[b, h, s, at + 1] = turned.real, turned.imag
                    k_out[b, h, s, at], k_out[b, h, s, at + 1] = k_rope[b, s, 2 * i], k_rope[b, s, 2 * i + 1]
                for i in range(VALUE):
                    v_out[b, h, s, i] = kv[b, s, h, NOPE + i]
    return [q_out, k_out, v_out]


def worst(found: Any, expected: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_equals_the_definition() -> None:
    case = draw()
    assert worst(mla_heads(*case), naive(*case)) < 1e-14


@pytest.mark.parametrize(
    "mistake",
    [
        lambda q, kv, k, c, s: (q, kv, k, c, -s),
        lambda q, kv, k, c, s: (q, kv, k, s, c),
        lambda q, kv, k, c, s: (q, kv, k, c.roll(1, 0), s.roll(1, 0)),
        lambda q, kv, k, c, s: (q[..., [*range(NOPE), 5, 7, 6, 8]], kv, k, c, s),
        lambda q, kv, k, c, s: (q.roll(ROPE, -1), kv, k, c, s),
        lambda q, kv, k, c, s: (q, kv.roll(VALUE, -1), k, c, s),
        lambda q, kv, k, c, s: (q, kv, apply_rope(k, c, s), c, s),
    ],
    ids=["backwards", "cos_sin_swapped", "next_position", "halves", "rope_first", "value_first", "key_turned_twice"],
)
def test_the_oracle_tells_mistakes_apart(mistake: Any) -> None:
    case = draw()
    assert worst(mla_heads(*mistake(*case)), naive(*case)) > 1e-2


def test_gradients_by_finite_differences() -> None:
    q, kv, k_rope, cos, sin = draw()
    inputs = [tensor.requires_grad_() for tensor in (q, kv, k_rope)]
    assert torch.autograd.gradcheck(lambda *tensors: mla_heads(*tensors, cos, sin), inputs)


def test_values_are_a_view() -> None:
    q, kv, k_rope, cos, sin = draw()
    v_BHSv = mla_heads(q, kv, k_rope, cos, sin)[2]
    kv += 1
    assert torch.equal(v_BHSv, kv[..., NOPE:].transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_turned_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """In fp32, two products and their sum; what is not turned keeps its bits."""
    q, kv, k_rope, cos, sin = draw(dtype)
    found = mla_heads(q, kv, k_rope, cos.float(), sin.float())
    exact = naive(q, kv, k_rope, cos, sin)
    assert all(tensor.dtype == dtype for tensor in found)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    near = rounding * exact[0].abs() + 2.0**-22 * q.abs().max()
    assert ((found[0].double() - exact[0]).abs() <= near).all()
    assert torch.equal(found[0][..., :NOPE].double(), exact[0][..., :NOPE])
    assert worst(found[1:], exact[1:]) == 0


SHAPES = {"q": (2, 3, 4, 9), "kv": (2, 3, 4, 7), "k_rope": (2, 3, 4), "cos": (3, 2), "sin": (3, 2)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 3, 4, 4)),
        ("q", (2, 3, 36)),
        ("kv", (2, 3, 3, 7)),
        ("kv", (2, 3, 4, 5)),
        ("k_rope", (2, 4, 4)),
        ("k_rope", (2, 3, 5)),
        ("k_rope", (2, 3, 2)),
        ("cos", (4, 2)),
        ("sin", (3, 4)),
    ],
)
def test_refuses_what_does_not_belong_together(name: str, shape: tuple[int, ...]) -> None:
    tensors = [torch.zeros(size) for size in (SHAPES | {name: shape}).values()]
    mla_heads(*(torch.zeros(size) for size in SHAPES.values()))
    with pytest.raises(ShapeError, match=r"expected q \(B, S, H, n \+ r\), .* found .*: use"):
        mla_heads(*tensors)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_selftest_fails_where_the_op_is_wrong(
    wrong: int, ops: Ops, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(*args: torch.Tensor) -> list[torch.Tensor]:
        return [out * (1 + 1e-4 * (i == wrong)) for i, out in enumerate(mla_heads(*args))]

    setting = selftest.Setting(dataclasses.replace(ops, mla_heads=changed), "cpu", torch.float32, 2.0**-20)
    monkeypatch.setattr(selftest, "choose_setting", lambda: (setting, []))
    assert selftest.main([]) == 1
    failed = {line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL  mla_heads")}
    assert failed == ({"q", "dq"}, {"k", "dkv", "dk_rope"}, {"v", "dkv"})[wrong]
