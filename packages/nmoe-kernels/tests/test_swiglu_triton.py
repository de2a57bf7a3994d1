"""The Triton SwiGLU: in the interpreter against float64 without a GPU; on one, the same (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""

SHAPES = {
    "row": (1, 16),
    "odd": (3, 5),
    "thin": (7, 1),
    "blocks": (4, 1024),
    "tail": (3, 1500),
    "several": (19, 384),
    "deep": (2, 3, 40),
}
EXTREME = [0.0, -0.0, 1e-30, 88.0, -88.0, 200.0, -200.0, 1e4, -1e4, 1e30, -1e30]


def draw(name: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32."""
    generator = torch.Generator().manual_seed(len(name))
    shape = SHAPES[name]
    pre = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3
    if name == "blocks":
        pre[0, : len(EXTREME)] = torch.tensor(EXTREME)
    dout = torch.randn(shape, generator=generator)
    return {"pre": pre.bfloat16().float().numpy(), "dout": dout.bfloat16().float().numpy()}


def exact(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By autograd in float64."""
    pre = torch.from_numpy(case["pre"]).double().requires_grad_()
    gate, up = pre.chunk(2, -1)
    out = gate * gate.sigmoid() * up
    out.backward(torch.from_numpy(case["dout"]).double())
    return {"out": out.detach(), "dpre": pre.grad}


def near(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> bool:
    """Each element; what is smaller than 1e-30 counts nothing."""
    return bool(((found.double() - expected).abs() <= rounding * expected.abs() + 1e-30).all())


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    return interpret("swiglu_interpreted.py", {name: draw(name) for name in SHAPES})


@pytest.mark.parametrize("name", SHAPES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], name: str) -> None:
    for result, expected in exact(draw(name)).items():
        found = torch.from_numpy(interpreted[f"{name}/{result}"])
        assert found.shape == expected.shape
        assert near(found, expected, 2 * ROUNDING), result


@pytest.mark.parametrize("mistake", ["halves exchanged", "gate not differentiated", "next row"])
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    case = draw("tail")
    if mistake == "halves exchanged":
        case["pre"] = np.roll(case["pre"], 1500, -1)
    elif mistake == "next row":
        case["pre"] = np.roll(case["pre"], 1, 0)
    expected = exact(case)["dpre"]
    if mistake == "gate not differentiated":
        expected[:, :1500] = torch.from_numpy(case["dout"] * case["pre"][:, 1500:])
    assert not near(torch.from_numpy(interpreted["tail/dpre"]), expected, 2 * ROUNDING)


@pytest.mark.parametrize(("shape", "dtype"), [((4, 6), torch.float32), ((4, 5), torch.bfloat16), ((), torch.bfloat16)])
def test_refuses(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from nmoe.kernels.native.swiglu_triton import swiglu

    pre = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ShapeError, match=r"expected gate and up \(…, 2F\) of torch.bfloat16, found"):
        swiglu(pre)


@pytest.mark.parametrize(
    ("hidden", "block"), [(11_264, 1024), (2816, 1024), (512, 512), (1280, 256), (384, 128), (16, 128)]
)
def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any, hidden: int, block: int) -> None:
    """And its programs cover all rows and columns, with little beyond."""
    from nmoe.kernels.native import swiglu_triton as module

    forward, backward = (launches_of(module, name) for name in ("_swiglu_kernel", "_swiglu_backward_kernel"))
    pre = torch.zeros(5, 2 * hidden).bfloat16().requires_grad_()
    module.swiglu(pre).sum().backward()
    listed = {kernel.name: kernel for kernel in module.TRITON_KERNELS}
    for name, launched in (("swiglu", forward), ("swiglu_backward", backward)):
        kernel = listed[f"{name}_{block}"]
        assert launched.grid == (-(-5 * block // 1024), -(-hidden // block))
        types = tuple("*bf16" if isinstance(x, torch.Tensor) else "i32" for x in launched.args)
        assert types == tuple(kind for _, kind in kernel.signature)
        assert launched.options == dict((*kernel.constants, *kernel.options))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64_on_a_gpu(gpu: str, name: str) -> None:
    """And the same bits again; a gradient with strides of 0 too."""
    from nmoe.kernels.native.swiglu_triton import swiglu

    case = draw(name)
    pre = torch.from_numpy(case["pre"]).bfloat16().to(gpu).requires_grad_()
    dout = torch.from_numpy(case["dout"]).bfloat16().to(gpu)
    out = swiglu(pre)
    (dpre,) = torch.autograd.grad(out, pre, dout, retain_graph=True)
    expected = exact(case)
    assert near(out.detach().cpu(), expected["out"], ROUNDING)
    assert near(dpre.cpu(), expected["dpre"], ROUNDING)
    assert torch.equal(swiglu(pre), out)
    assert torch.equal(torch.autograd.grad(out, pre, dout, retain_graph=True)[0], dpre)
    one = torch.ones((), device=gpu).bfloat16()
    assert torch.equal(
        torch.autograd.grad(out, pre, one.expand_as(out), retain_graph=True)[0],
        torch.autograd.grad(out, pre, torch.ones_like(out))[0],
    )
