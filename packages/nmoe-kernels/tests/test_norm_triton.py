"""The Triton RMSNorm: in the interpreter against float64 without a GPU; on one, the same (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""

SHAPES = {"one": (1, 1), "odd": (5, 7), "heads": (300, 64), "padded": (11, 768), "wide": (7, 2048), "long": (2, 5000)}


def draw(name: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32; one row is all zeros, one large."""
    generator = torch.Generator().manual_seed(len(name))
    rows, width = SHAPES[name]
    x, dout = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight = 1 + 0.2 * torch.randn(width, generator=generator)
    if rows > 4:
        x[1], x[2] = 0.0, x[2] * 1e4
    arrays = {"x": x, "dout": dout, "weight": weight}
    return {key: tensor.bfloat16().float().numpy() for key, tensor in arrays.items()} | {"eps": np.array(1e-5)}


def exact(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By autograd in float64."""
    x, weight = (torch.from_numpy(case[name]).double().requires_grad_() for name in ("x", "weight"))
    out = x / (x.square().mean(-1, keepdim=True) + float(case["eps"])).sqrt() * weight
    out.backward(torch.from_numpy(case["dout"]).double())
    return {"out": out.detach(), "dx": x.grad, "dweight": weight.grad}


def near(name: str, found: torch.Tensor, expected: torch.Tensor, rounding: float) -> bool:
    """A rounding of each element, and fp32's error of the row's sums; the gain's gradient has no rounding."""
    size = expected.abs().amax(-1, keepdim=True)
    rounding = 0.0 if name == "dweight" else rounding
    return bool(((found.double() - expected).abs() <= rounding * expected.abs() + 1e-5 * size + 1e-30).all())


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    return interpret("norm_interpreted.py", {name: draw(name) for name in SHAPES})


@pytest.mark.parametrize("name", SHAPES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], name: str) -> None:
    for result, expected in exact(draw(name)).items():
        found = torch.from_numpy(interpreted[f"{name}/{result}"])
        assert found.shape == expected.shape
        assert near(result, found, expected, 2 * ROUNDING), result


@pytest.mark.parametrize(
    ("mistake", "seen_in"),
    [
        ("mean not removed", "out"),
        ("gain left out", "out"),
        ("a row left out", "dweight"),
        ("row constant left out", "dx"),
        ("eps left out", "out"),
    ],
)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str, seen_in: str) -> None:
    case = draw("heads")
    if mistake == "mean not removed":
        case["x"] = case["x"] - case["x"].mean(-1, keepdims=True)
    elif mistake == "gain left out":
        case["weight"] = np.ones_like(case["weight"])
    elif mistake == "eps left out":
        case["eps"] = np.array(1e-2)
    expected = exact(case)[seen_in]
    if mistake == "a row left out":
        case["dout"][77] = 0
        expected = exact(case)[seen_in]
    elif mistake == "row constant left out":
        x = torch.from_numpy(case["x"]).double()
        gained = torch.from_numpy(case["dout"] * case["weight"]).double()
        expected = gained / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = torch.from_numpy(interpreted[f"heads/{seen_in}"])
    assert not near(seen_in, found, expected, 2 * ROUNDING)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(4, 8), torch.zeros(8)),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(8)),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(7).bfloat16()),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(16).bfloat16()[::2]),
        (torch.zeros(1, 16_385).bfloat16(), torch.zeros(16_385).bfloat16()),
        (torch.zeros(4, 8, device="meta").bfloat16(), torch.zeros(8).bfloat16()),
    ],
    ids=["fp32", "weight", "width", "strided", "wide", "device"],
)
def test_refuses(x: torch.Tensor, weight: torch.Tensor) -> None:
    from nmoe.kernels.native.norm_triton import rms_norm

    with pytest.raises(ShapeError, match=r"expected x \(…, D\) and weight \(D\), torch.bfloat16 on one device"):
        rms_norm(x, weight, 1e-6)


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    from nmoe.kernels.native import norm_triton as module

    kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    launched = set()
    for width in (64, 128, 512, 768, 2048):
        kernels = {name: launches_of(module, name) for name in ("_norm_kernel", "_norm_backward_kernel")}
        x = torch.zeros(4, width).bfloat16().requires_grad_()
        module.rms_norm(x, torch.ones(width).bfloat16(), 1e-6).sum().backward()
        for name, kernel in kernels.items():
            types = tuple(
                kinds[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32"
                for a in kernel.args
            )
            launched.add((name, types, frozenset(kernel.options.items())))
    listed = {
        (k.function, tuple(kind for _, kind in k.signature), frozenset((*k.constants, *k.options)))
        for k in module.TRITON_KERNELS
    }
    assert launched == listed


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SHAPES, "many"])
def test_equals_float64_on_a_gpu(gpu: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bits again."""
    from nmoe.kernels.native.norm_triton import rms_norm

    monkeypatch.setitem(SHAPES, "many", (200_003, 64))
    case = draw(name)
    x, weight, dout = (torch.from_numpy(case[key]).bfloat16().to(gpu) for key in ("x", "weight", "dout"))
    results = []
    for _ in range(2):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        weight.main_grad = torch.zeros(weight.shape, device=gpu)
        out = rms_norm(x, weight, 1e-5)
        out.backward(dout)
        results.append({"out": out.detach(), "dx": x.grad, "dweight": weight.main_grad})
    for key, expected in exact(case).items():
        assert near(key, results[0][key].cpu(), expected, ROUNDING), key
        assert torch.equal(results[0][key], results[1][key]), key
