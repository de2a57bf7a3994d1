"""The Triton RoPE: in the interpreter against float64 without a GPU; on one, the same (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.rope import rope as reference_rope
from nmoe.kernels.reference.rope import rope_frequencies, rope_tables

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""

SHAPES = {
    "one": (1, 1, 1, 2),
    "heads": (2, 3, 17, 64),
    "odd": (1, 5, 3, 20),
    "wide": (2, 4, 12, 128),
    "shared": (3, 7, 1, 64),
    "widest": (1, 3, 2, 2048),
}


def draw(name: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32, and tables of positions from 1000 on."""
    generator = torch.Generator().manual_seed(len(name))
    shape = SHAPES[name]
    x, dout = (torch.randn(shape, generator=generator).bfloat16().float() for _ in range(2))
    cos, sin = rope_tables(torch.arange(1000, 1000 + shape[1]), rope_frequencies(shape[3], 10_000.0))
    return {"x": x.numpy(), "dout": dout.numpy(), "cos": cos.numpy(), "sin": sin.numpy()}


def exact(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By complex numbers in float64; the gradient is turned back."""
    cos, sin = (torch.from_numpy(case[name]).double()[:, None] for name in ("cos", "sin"))

    def turned(x: np.ndarray, way: int) -> torch.Tensor:
        pairs = torch.view_as_complex(torch.from_numpy(x).double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, way * sin)).flatten(-2)

    return {"out": turned(case["x"], 1), "dx": turned(case["dout"], -1)}


def near(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> bool:
    """Each element within a rounding, and fp32's rounding of the pair that it comes from."""
    size = expected.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*expected.shape[:-1], -1, 2).flatten(-2)
    return bool(((found.double() - expected).abs() <= rounding * expected.abs() + 2.0**-22 * size).all())


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    cases = {name: draw(name) for name in SHAPES}
    return interpret("rope_interpreted.py", cases | {"strided": draw("heads") | {"strided": np.array(1)}})


@pytest.mark.parametrize("name", SHAPES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], name: str) -> None:
    for result, expected in exact(draw(name)).items():
        assert near(torch.from_numpy(interpreted[f"{name}/{result}"]), expected, 2 * ROUNDING), result


@pytest.mark.parametrize("result", ["out", "dx"])
def test_strides_have_no_influence(interpreted: dict[str, np.ndarray], result: str) -> None:
    assert np.array_equal(interpreted[f"strided/{result}"], interpreted[f"heads/{result}"])


@pytest.mark.parametrize(
    "mistake", ["turned back", "cos and sin exchanged", "position of the next", "halves, not pairs"]
)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    case = draw("heads")
    if mistake == "turned back":
        case["sin"] = -case["sin"]
    elif mistake == "cos and sin exchanged":
        case["cos"], case["sin"] = case["sin"], case["cos"]
    elif mistake == "position of the next":
        case["cos"], case["sin"] = np.roll(case["cos"], 1, 0), np.roll(case["sin"], 1, 0)
    else:
        case["x"] = case["x"].reshape(*case["x"].shape[:-1], 32, 2).swapaxes(-1, -2).reshape(case["x"].shape)
    assert not near(torch.from_numpy(interpreted["heads/out"]), exact(case)["out"], 2 * ROUNDING)


def test_the_reference_is_the_same_function() -> None:
    case = draw("heads")
    found = reference_rope(*(torch.from_numpy(case[name]).double() for name in ("x", "cos", "sin")))
    assert torch.allclose(found, exact(case)["out"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "tables"),
    [
        (torch.zeros(1, 5, 2, 8), torch.zeros(5, 4)),
        (torch.zeros(1, 5, 2, 8).bfloat16(), torch.zeros(6, 4)),
        (torch.zeros(1, 5, 2, 8).bfloat16(), torch.zeros(5, 4).bfloat16()),
        (torch.zeros(1, 5, 2, 7).bfloat16(), torch.zeros(5, 3)),
        (torch.zeros(5, 2, 8).bfloat16(), torch.zeros(5, 4)),
    ],
    ids=["fp32", "positions", "tables", "odd", "dims"],
)
def test_refuses(x: torch.Tensor, tables: torch.Tensor) -> None:
    from nmoe.kernels.native.rope_triton import rope

    with pytest.raises(ShapeError, match=r"expected x \(B, S, H, d\) of torch.bfloat16 and tables .*; found"):
        rope(x, tables, tables)


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    from nmoe.kernels.native import rope_triton as module

    for kernel, width in zip(module.TRITON_KERNELS, (64, 128), strict=True):
        launched = launches_of(module, "_turn_kernel")
        tables = torch.zeros(5, width // 2)
        module.rope(torch.zeros(1, 5, 2, width).bfloat16(), tables, tables)
        kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
        types = tuple(
            kinds[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
            for x in launched.args
        )
        assert types == tuple(kind for _, kind in kernel.signature)
        assert launched.options == dict((*kernel.constants, *kernel.options))
        assert launched.grid == (-(-5 * 2 // (1024 // width)),)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64_on_a_gpu(gpu: str, name: str) -> None:
    """And the same bits again."""
    from nmoe.kernels.native.rope_triton import rope

    case = draw(name)
    x, dout = (torch.from_numpy(case[key]).bfloat16().to(gpu) for key in ("x", "dout"))
    cos, sin = (torch.from_numpy(case[key]).to(gpu) for key in ("cos", "sin"))
    out = rope(x.requires_grad_(), cos, sin)
    (dx,) = torch.autograd.grad(out, x, dout)
    expected = exact(case)
    assert near(out.detach().cpu(), expected["out"], ROUNDING)
    assert near(dx.cpu(), expected["dx"], ROUNDING)
    assert torch.equal(rope(x, cos, sin), out)
