"""The Triton RMSNorm, alone and after an addition: in the interpreter against float64 without a GPU; on one, the same
(`-m gpu`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""

SHAPES = {"one": (1, 1), "odd": (5, 7), "heads": (300, 64), "padded": (11, 768), "wide": (7, 2048), "long": (2, 5000)}


KINDS = {"alone": (), "through": ("dtotal",), "added": ("dtotal", "delta")}
"""What a case has besides: the op is `rms_norm`, or `add_rms_norm` with None or something to add."""

CASES = [f"{shape}-{kind}" for shape in SHAPES for kind in KINDS]


def draw(name: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32; one row is all zeros, one large."""
    shape, kind = name.split("-")
    generator = torch.Generator().manual_seed(len(shape))
    rows, width = SHAPES[shape]
    x, dout, dtotal, delta = (torch.randn(rows, width, generator=generator) for _ in range(4))
    weight = 1 + 0.2 * torch.randn(width, generator=generator)
    if rows > 4:
        x[1], x[2], delta[1] = 0.0, x[2] * 1e4, 0.0
    arrays = {"x": x, "dout": dout, "weight": weight}
    arrays |= {key: {"dtotal": dtotal, "delta": delta}[key] for key in KINDS[kind]}
    return {key: tensor.bfloat16().float().numpy() for key, tensor in arrays.items()} | {"eps": np.array(1e-5)}


def exact(case: dict[str, np.ndarray], total: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """By autograd in float64; norm and gradients at the sum as it was rounded, where that is given."""
    wide = {name: torch.from_numpy(array).double() for name, array in case.items()}
    summed = wide["x"] + wide["delta"] if "delta" in wide else wide["x"]
    x, weight = (summed if total is None else total.double()).requires_grad_(), wide["weight"].requires_grad_()
    out = x / (x.square().mean(-1, keepdim=True) + wide["eps"]).sqrt() * weight
    out.backward(wide["dout"])
    assert x.grad is not None
    dx = x.grad + wide["dtotal"] if "dtotal" in wide else x.grad
    results = {"out": out.detach(), "dx": dx, "dweight": weight.grad}
    if "dtotal" in wide:
        results["total"] = summed.detach()
    if "delta" in wide:
        results["ddelta"] = dx
    return results


def near(name: str, found: torch.Tensor, expected: torch.Tensor, rounding: float) -> bool:
    """A rounding of each element, and fp32's error of the row's sums; the gain's gradient has no rounding."""
    size = expected.abs().amax(-1, keepdim=True)
    rounding = 0.0 if name == "dweight" else rounding
    return bool(((found.double() - expected).abs() <= rounding * expected.abs() + 1e-5 * size + 1e-30).all())


def wrong_results(case: dict[str, np.ndarray], found: dict[str, torch.Tensor], rounding: float) -> set[str]:
    """Those that are not near float64's, one of another shape among them."""
    expected = exact(case, found.get("total"))
    assert expected.keys() == found.keys()
    return {
        name
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape or not near(name, found[name], tensor, rounding)
    }


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Results by case and name, from one run of the interpreter."""
    results: dict[str, dict[str, torch.Tensor]] = {case: {} for case in CASES}
    for key, array in interpret("norm_interpreted.py", {case: draw(case) for case in CASES}).items():
        case, name = key.split("/")
        results[case][name] = torch.from_numpy(array)
    return results


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    assert wrong_results(draw(name), interpreted[name], 2 * ROUNDING) == set()


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        (lambda c: {"dtotal": 0 * c["dtotal"]}, {"dx", "ddelta"}),
        (lambda c: {"dtotal": np.roll(c["dtotal"], 1, 0)}, {"dx", "ddelta"}),
        (lambda c: {"delta": -c["delta"]}, {"total"}),
        (lambda c: {"dout": np.roll(c["dout"], 1, 0)}, {"dx", "ddelta", "dweight"}),
        (lambda c: {"eps": np.array(0.1)}, {"out", "dx", "ddelta", "dweight"}),
    ],
    ids=["sum's gradient left out", "next row's", "subtracted", "next row's norm", "eps"],
)
def test_the_bounds_of_addition_and_norm_tell_mistakes_apart(
    interpreted: dict[str, dict[str, torch.Tensor]], change: Any, reached: set[str]
) -> None:
    """The kernel's results against those of other inputs: exactly what these reach is refused."""
    case = draw("heads-added")
    assert wrong_results(case | change(case), interpreted["heads-added"], 2 * ROUNDING) == reached


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
def test_the_bounds_tell_mistakes_apart(
    interpreted: dict[str, dict[str, torch.Tensor]], mistake: str, seen_in: str
) -> None:
    case = draw("heads-alone")
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
    assert not near(seen_in, interpreted["heads-alone"][seen_in], expected, 2 * ROUNDING)


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
    from nmoe.kernels.native.norm_triton import add_rms_norm, rms_norm

    for op in (rms_norm, lambda x, weight, eps: add_rms_norm(x, x, weight, eps)):
        with pytest.raises(ShapeError, match=r"expected x \(…, D\) and weight \(D\), torch.bfloat16 on one device"):
            op(x, weight, 1e-6)


@pytest.mark.parametrize("delta", [torch.zeros(4, 8), torch.zeros(3, 8).bfloat16(), torch.zeros(8).bfloat16()])
def test_refuses_to_add_something_else(delta: torch.Tensor) -> None:
    from nmoe.kernels.native.norm_triton import add_rms_norm

    with pytest.raises(ShapeError, match=r"expected delta \(4, 8\) of torch.bfloat16 on cpu as x is, found"):
        add_rms_norm(torch.zeros(4, 8).bfloat16(), delta, torch.zeros(8).bfloat16(), 1e-6)


def test_a_sum_or_a_norm_that_leads_nowhere_costs_nothing(launches_of: Any) -> None:
    """No zeros are read for the gradient of the one, and without the other's no kernel runs."""
    from nmoe.kernels.native import norm_triton as module

    forward, backward = (launches_of(module, name) for name in ("_norm_kernel", "_norm_backward_kernel"))
    x, delta = (torch.zeros(4, 64).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.ones(64).bfloat16().requires_grad_()
    dtotal = torch.randn(4, 64).bfloat16()
    total, _ = module.add_rms_norm(x, delta, weight, 1e-6)
    total.backward(dtotal)
    assert forward.grid
    assert backward.grid is None
    assert torch.equal(x.grad, dtotal)
    assert torch.equal(delta.grad, dtotal)
    assert weight.grad is None
    module.add_rms_norm(x, delta, weight, 1e-6)[1].backward(dtotal)
    assert backward.options["ADD"] is False
    assert all(torch.equal(argument, dtotal) for argument in backward.args[:2])


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    from nmoe.kernels.native import norm_triton as module

    kinds = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    launched = set()
    for width, add in [(width, False) for width in (512, 768, 2048)] + [(768, True), (2048, True)]:
        kernels = {name: launches_of(module, name) for name in ("_norm_kernel", "_norm_backward_kernel")}
        x, weight = torch.zeros(4, width).bfloat16().requires_grad_(), torch.ones(width).bfloat16()
        outputs = module.add_rms_norm(x, x.detach(), weight, 1e-6) if add else [module.rms_norm(x, weight, 1e-6)]
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
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


def catalog() -> list[Any]:
    from nmoe.kernels.native.norm_triton import TRITON_KERNELS

    return [
        pytest.param(kernel, arch, id=f"{kernel.name}-{arch}")
        for kernel in TRITON_KERNELS
        if dict(kernel.constants)["WIDTH"] >= 1024
        for arch in kernel.arches
    ]


@pytest.mark.parametrize(("kernel", "arch"), catalog())
def test_compiles_to_loads_of_16_bytes(kernel: Any, arch: str, tmp_path: Path) -> None:
    """Of all rows, and no fused multiply-add."""
    from nmoe.kernels.runtime.triton_aot import compile_triton

    compiled = compile_triton(kernel, arch, tmp_path)
    assert not compiled.resources.spills
    (ptx,) = tmp_path.rglob("*.ptx")
    text = ptx.read_text()
    constants = dict(kernel.constants)
    backward = kernel.function == "_norm_backward_kernel"
    tensors = (2 if backward else 1) + constants["ADD"]
    each = 4 if not backward else 2 * 4  # the first rows, and the next ones
    assert text.count("ld.global.v4.b32") >= tensors * each
    assert text.count("st.global.v4.b32") >= (4 if backward else 4 * (1 + constants["ADD"]))
    assert "fma.rn" not in text


def on_gpu(name: str, gpu: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array).bfloat16().to(gpu) for key, array in draw(name).items() if key != "eps"}


def results_of(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients, the gain's in fp32."""
    from nmoe.kernels.native.norm_triton import add_rms_norm, rms_norm

    x, weight = given["x"].detach().requires_grad_(), given["weight"].detach().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=weight.device)
    if "dtotal" not in given:
        out = rms_norm(x, weight, 1e-5)
        out.backward(given["dout"])
        return {"out": out.detach(), "dx": x.grad, "dweight": weight.main_grad}
    delta = given["delta"].detach().requires_grad_() if "delta" in given else None
    total, out = add_rms_norm(x, delta, weight, 1e-5)
    torch.autograd.backward((total, out), (given["dtotal"], given["dout"]))
    results = {"total": total.detach(), "out": out.detach(), "dx": x.grad, "dweight": weight.main_grad}
    return results if delta is None else results | {"ddelta": delta.grad}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, "many", "model"])
def test_equals_float64_on_a_gpu(gpu: str, shape: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bits again; the sum's are PyTorch's."""
    monkeypatch.setitem(SHAPES, "many", (200_003, 64))
    monkeypatch.setitem(SHAPES, "model", (9001, 768))
    given = on_gpu(f"{shape}-{kind}", gpu)
    found, again = results_of(given), results_of(given)
    case = draw(f"{shape}-{kind}")
    assert wrong_results(case, {name: tensor.cpu() for name, tensor in found.items()}, ROUNDING) == set()
    assert all(torch.equal(found[name], again[name]) for name in found)
    if kind == "added":
        assert torch.equal(found["total"], given["x"] + given["delta"])


@pytest.mark.gpu
def test_a_captured_graph_reads_new_inputs(gpu: str) -> None:
    first, second = on_gpu("padded-added", gpu), on_gpu("padded-added", gpu)
    for tensor in second.values():
        tensor.mul_(-1.5).add_(0.25)
    expected = [results_of(first), results_of(second)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results_of(first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results_of(first)
    graph.replay()
    assert all(torch.equal(found[name], expected[0][name]) for name in found)
    for name, tensor in first.items():
        tensor.copy_(second[name])
    graph.replay()
    assert all(torch.equal(found[name], expected[1][name]) for name in found)
