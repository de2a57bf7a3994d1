"""The Triton kernels of plain attention's heads: without a GPU in the interpreter against float64, and compiled for
Hopper and Blackwell; on one, against float64 too (`-m gpu`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference import qkv as reference

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""

EPS = 1e-2

SIZES = {
    "usual": (2, 5, 12, 64),
    "wide": (1, 3, 6, 128),
    "widest": (1, 2, 3, 256),
    "odd": (2, 7, 5, 6),
    "least": (1, 1, 1, 2),
    "padded": (3, 3, 4, 80),
}
"""B, S, H, d; a program takes four heads or fewer at a time, of one token or more."""

ORDERS = {"BSHd": (0, 2, 1, 3), "BHSd": (0, 1, 2, 3), "SBdH": (2, 0, 3, 1)}
"""Of the gradients' dimensions in memory; in the last, a row's numbers lie apart."""

CASES = [
    "usual-BSHd-norm",
    "usual-BHSd-norm",
    "usual-BSHd-bare",
    "wide-BSHd-norm",
    "widest-BHSd-norm",
    "odd-BSHd-norm",
    "odd-SBdH-norm",
    "odd-BHSd-bare",
    "odd-BSHd-norm-dq",
    "odd-BSHd-norm-dk",
    "odd-BSHd-norm-dv",
    "least-BSHd-norm",
    "padded-BHSd-norm",
]
"""Sizes, order, with norms or without, and the only gradient that is defined."""

GAINS, GRADIENTS = ("q_gain", "k_gain"), ("dq", "dk", "dv")
RESULTS = ("q", "k", "v", "dqkv", "dq_gain", "dk_gain")


def draw(case: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32, and tables of fp32, 1.1 times longer than one as YaRN's may be."""
    name, order, norm, *only = case.split("-")
    batch, length, heads, width = SIZES[name]
    generator = torch.Generator().manual_seed(CASES.index(case) if case in CASES else 99)
    drawn = {"qkv": torch.randn(batch, length, 3, heads, width, generator=generator)}
    drawn |= {name: torch.randn(batch, heads, length, width, generator=generator) for name in GRADIENTS}
    gains = {name: 1 + 0.2 * torch.randn(width, generator=generator) for name in GAINS}
    drawn |= gains if norm == "norm" else {}
    drawn = {name: tensor.bfloat16().float() for name, tensor in drawn.items() if not only or name not in GRADIENTS}
    if only:
        drawn[only[0]] = torch.randn(batch, heads, length, width, generator=generator).bfloat16().float()
    angle = torch.rand(length, width // 2, generator=generator) * 6
    drawn |= {"cos": 1.1 * angle.cos(), "sin": 1.1 * angle.sin()}
    arrays = {name: tensor.numpy() for name, tensor in drawn.items()}
    return arrays | {"order": np.array(ORDERS[order]), "eps": np.array(EPS)}


def exact(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By autograd in float64."""
    wide = {name: torch.from_numpy(array).double() for name, array in case.items()}
    leaves = [wide[name].requires_grad_() for name in ("qkv", *GAINS) if name in wide]
    gains = (leaves[1], leaves[2]) if len(leaves) > 1 else None
    outputs = reference.qkv_heads(leaves[0], gains, float(case["eps"]), wide["cos"], wide["sin"])
    total = sum((out * wide[name]).sum() for name, out in zip(GRADIENTS, outputs, strict=True) if name in wide)
    total = total + sum(0 * leaf.sum() for leaf in leaves)
    values = (*(tensor.detach() for tensor in outputs), *torch.autograd.grad(total, leaves))
    return dict(zip(RESULTS, values, strict=False))


def wrong_results(case: dict[str, np.ndarray], found: dict[str, torch.Tensor], rounding: float) -> set[str]:
    """Those that are not within one rounding to bf16 of float64, and fp32's own; gains' gradients have no rounding, and
    values their bits."""
    expected = exact(case)
    assert expected.keys() == found.keys()
    wrong = set()
    for name, tensor in expected.items():
        difference = (found[name].double() - tensor).abs()
        own = rounding if name in ("q", "k", "dqkv") else 0.0
        # A head's sums and turns; a gain's terms, of which there are B·S·H.
        size = tensor.abs().amax() if "gain" in name else tensor.abs().amax(-1, keepdim=True)
        bound = own * tensor.abs() + (0.0 if name == "v" else 1e-5) * size + (0.0 if name == "v" else 1e-30)
        if found[name].shape != tensor.shape or not (difference <= bound).all():
            wrong.add(name)
    if "dv" in case and not torch.equal(found["dqkv"][:, :, 2].double(), expected["dqkv"][:, :, 2]):
        wrong.add("dqkv")
    return wrong


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Results by case and name, from one run of the interpreter."""
    results: dict[str, dict[str, torch.Tensor]] = {case: {} for case in CASES}
    for key, array in interpret("qkv_interpreted.py", {case: draw(case) for case in CASES}).items():
        case, name = key.split("/")
        results[case][name] = torch.from_numpy(array)
    return results


@pytest.mark.parametrize("case", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, dict[str, torch.Tensor]], case: str) -> None:
    assert wrong_results(draw(case), interpreted[case], 2 * ROUNDING) == set()


def swapped(qkv: np.ndarray) -> np.ndarray:
    """Queries and keys exchanged."""
    return qkv[:, :, [1, 0, 2]]


MISTAKES: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], set[str]]] = {
    "turned the wrong way": (lambda c: {"sin": -c["sin"]}, {"q", "k", "dqkv", "dq_gain", "dk_gain"}),
    "next position": (
        lambda c: {n: np.roll(c[n], 1, 0) for n in ("cos", "sin")},
        {"q", "k", "dqkv", "dq_gain", "dk_gain"},
    ),
    "keys before queries": (lambda c: {"qkv": swapped(c["qkv"])}, {"q", "k", "dqkv", "dq_gain", "dk_gain"}),
    "next head": (lambda c: {"qkv": np.roll(c["qkv"], 1, 3)}, {"q", "k", "v", "dqkv", "dq_gain", "dk_gain"}),
    "gains exchanged": (lambda c: {"q_gain": c["k_gain"], "k_gain": c["q_gain"]}, {"q", "k", "dqkv"}),
    "a head left out of the gain's gradient": (
        lambda c: {"dq": c["dq"] * (np.arange(12) != 11)[:, None, None]},
        {"dqkv", "dq_gain"},
    ),
    "next head's gradient": (lambda c: {"dv": np.roll(c["dv"], 1, 1)}, {"dqkv"}),
    "another epsilon": (lambda c: {"eps": np.array(0.1)}, {"q", "k", "dqkv", "dq_gain", "dk_gain"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, dict[str, torch.Tensor]], mistake: str) -> None:
    """The kernel's results against those of other inputs: exactly what these reach is refused."""
    case, (change, reached) = draw("usual-BHSd-norm"), MISTAKES[mistake]
    assert wrong_results(case | change(case), interpreted["usual-BHSd-norm"], 2 * ROUNDING) == reached


def inputs(**changes: Any) -> dict[str, Any]:
    given = {"qkv": torch.zeros(2, 3, 3, 4, 6).bfloat16(), "gains": (torch.ones(6).bfloat16(),) * 2}
    return given | {"cos": torch.zeros(3, 3), "sin": torch.zeros(3, 3)} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv": torch.zeros(2, 3, 3, 4, 6)},
        {"gains": (torch.ones(6).bfloat16(), torch.ones(6))},
        {"cos": torch.zeros(3, 3).bfloat16()},
        {"sin": torch.zeros(3, 3, device="meta")},
        {"qkv": torch.zeros(1, 1, 3, 1, 258).bfloat16(), "gains": None}
        | {"cos": torch.zeros(1, 129), "sin": torch.zeros(1, 129)},
    ],
    ids=["fp32", "gain", "table", "device", "wide"],
)
def test_refuses(changes: dict[str, Any]) -> None:
    from nmoe.kernels.native.qkv_triton import qkv_heads

    given = inputs(**changes)
    with pytest.raises(ShapeError, match=r"expected qkv and gains of torch.bfloat16, d ≤ 256, and tables .* found"):
        qkv_heads(given["qkv"], given["gains"], EPS, given["cos"], given["sin"])


def test_refuses_what_does_not_belong_together() -> None:
    from nmoe.kernels.native.qkv_triton import qkv_heads

    with pytest.raises(ShapeError, match=r"expected qkv \(B, S, 3, H, d\)"):
        qkv_heads(torch.zeros(2, 3, 2, 4, 6).bfloat16(), None, EPS, torch.zeros(3, 3), torch.zeros(3, 3))


def test_an_empty_batch_gives_empty_tensors_and_no_gain() -> None:
    from nmoe.kernels.native.qkv_triton import qkv_heads

    qkv, gains = torch.zeros(0, 3, 3, 4, 6).bfloat16().requires_grad_(), inputs()["gains"]
    leaves = [gain.clone().requires_grad_() for gain in gains]
    out = qkv_heads(qkv, (leaves[0], leaves[1]), EPS, torch.zeros(3, 3), torch.zeros(3, 3))
    grads = torch.autograd.grad(out, [qkv, *leaves], [torch.ones_like(t) for t in out])
    assert [tuple(tensor.shape) for tensor in (*out, grads[0])] == [(0, 4, 3, 6)] * 3 + [(0, 3, 3, 4, 6)]
    assert not any(grad.any() for grad in grads[1:])


TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    """And outputs are heads beside each other in memory, as attention takes them without a copy."""
    from nmoe.kernels.native import qkv_triton as module

    for width in (64, 128):
        for norm in (False, True):
            launched = [launches_of(module, name) for name in ("_qkv_heads_kernel", "_qkv_heads_backward_kernel")]
            qkv = torch.zeros(2, 3, 3, 16, width).bfloat16().requires_grad_()
            gains = (torch.ones(width).bfloat16(), torch.ones(width).bfloat16()) if norm else None
            out = module.qkv_heads(qkv, gains, EPS, *(torch.zeros(3, width // 2) for _ in range(2)))
            token = 16 * width
            assert [tensor.stride()[1:] for tensor in out[:2]] == [(width, token, 1)] * 2
            assert out[2].stride()[1:] == (width, 3 * token, 1)
            assert out[2].data_ptr() == qkv[:, :, 2].data_ptr()
            torch.autograd.grad(out, qkv, [torch.zeros_like(tensor) for tensor in out])
            suffix = f"_{width}_norm" if norm else f"_{width}"
            listed = {kernel.name: kernel for kernel in module.TRITON_KERNELS}
            for name, launch in zip(("qkv_heads", "qkv_heads_backward"), launched, strict=True):
                kernel = listed[name + suffix]
                types = [
                    TYPES[x.dtype] if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
                    for x in launch.args
                ]
                assert types == [kind for _, kind in kernel.signature]
                assert launch.options == dict((*kernel.constants, *kernel.options))
                for (argument, _), x in zip(kernel.signature, launch.args, strict=True):
                    if argument in kernel.aligned:
                        assert (x.data_ptr() if isinstance(x, torch.Tensor) else x) % 16 == 0, argument


def catalog() -> list[Any]:
    from nmoe.kernels.native.qkv_triton import TRITON_KERNELS

    return [
        pytest.param(kernel, arch, id=f"{kernel.name}-{arch}") for kernel in TRITON_KERNELS for arch in kernel.arches
    ]


@pytest.mark.parametrize(("kernel", "arch"), catalog())
def test_compiles_to_loads_of_16_bytes(kernel: Any, arch: str, ahead: Any) -> None:
    """Of all heads and tables; no fused multiply-add; and of the backward no more registers than let all programs be
    there at once."""
    from nmoe.kernels.native.qkv_triton import _PROGRAMS

    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    text = ahead.ptx(kernel, compiled)
    backward, norm = kernel.function == "_qkv_heads_backward_kernel", dict(kernel.constants)["NORM"]
    loads = 2 * 2 + 4 if not backward else (5 if norm else 3) + 2
    assert text.count("ld.global.v4.b32") == loads, "of each tensor, and of both tables"
    assert text.count("ld.global") - text.count("ld.global.v4.b32") == 2 * norm, "the gains"
    assert text.count("st.global.v4.b32") >= (3 if backward else 4)
    assert "fma.rn" not in text
    if backward:
        threads = -(-_PROGRAMS // 132) * 32
        assert compiled.resources.registers * threads <= 65_536


# On the GPU at hand.


def on_gpu(case: dict[str, np.ndarray], gpu: str) -> dict[str, torch.Tensor]:
    """Tensors of one case, gradients in its order in memory."""
    order = case["order"].tolist()
    back = [order.index(dim) for dim in range(4)]
    there = {name: torch.from_numpy(case[name]).bfloat16().to(gpu) for name in ("qkv", *GAINS) if name in case}
    there |= {name: torch.from_numpy(case[name]).to(gpu) for name in ("cos", "sin")}
    for name in GRADIENTS:
        there[name] = torch.from_numpy(case[name]).to(gpu).bfloat16().permute(order).contiguous().permute(back)
    return there


def results(there: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients, the gains' in fp32."""
    from nmoe.kernels.native.qkv_triton import qkv_heads

    qkv = there["qkv"].detach().requires_grad_()
    gains = [there[name].detach().requires_grad_() for name in GAINS if name in there]
    for gain in gains:
        gain.main_grad, gain.main_grad_stale = torch.empty(gain.shape, device=gain.device), True
    out = qkv_heads(qkv, tuple(gains) or None, EPS, there["cos"], there["sin"])
    torch.autograd.backward(out, [there[name] for name in GRADIENTS])
    values = (*(tensor.detach() for tensor in out), qkv.grad, *(gain.main_grad for gain in gains))
    return dict(zip(RESULTS, values, strict=False))


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("norm", ["norm", "bare"])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", [*SIZES, "many"])
    def test_equals_float64(self, gpu: str, name: str, order: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the same bits again."""
        monkeypatch.setitem(SIZES, "many", (3, 1500, 12, 64))  # more than one block of tokens a program
        case = draw(f"{name}-{order}-{norm}")
        there = on_gpu(case, gpu)
        found = results(there)
        named = {key: tensor.float().cpu() for key, tensor in found.items()}
        assert wrong_results(case, named, ROUNDING) == set()
        for _ in range(3):
            again = results(there)
            assert all(torch.equal(found[key], again[key]) for key in found)

    def test_through_attention(self, gpu: str) -> None:
        """With the native attention after it, which takes values as they lie, against float64: norms within three
        roundings to bf16, one here and two of attention."""
        native = select_ops("native", gpu)
        qkv, dout = torch.randn(2, 77, 3, 12, 64).bfloat16(), torch.randn(2, 12, 77, 64).bfloat16()
        angle = torch.rand(77, 32) * 6
        given = qkv.to(gpu).requires_grad_()
        heads = native.qkv_heads(given, None, EPS, angle.cos().to(gpu), angle.sin().to(gpu))
        out = native.attention(*heads, scale=0.125)
        found = [out, *torch.autograd.grad(out, given, dout.to(gpu))]

        wide = qkv.double().requires_grad_()
        q, k, v = reference.qkv_heads(wide, None, EPS, angle.cos().double(), angle.sin().double())
        later = torch.ones(77, 77, dtype=torch.bool).triu(1)
        expected = (q @ k.mT * 0.125).masked_fill(later, float("-inf")).softmax(-1) @ v
        exact_values = [expected, *torch.autograd.grad(expected, wide, dout.double())]
        for a, b in zip(found, exact_values, strict=True):
            assert float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) < 3 * ROUNDING

    def test_a_captured_graph_reads_new_inputs(self, gpu: str, capture: Any) -> None:
        first, second = (on_gpu(draw("usual-BSHd-norm"), gpu) for _ in range(2))
        for name in ("qkv", *GAINS, *GRADIENTS):
            second[name].mul_(-1.5).add_(0.25)
        expected = [results(first), results(second)]
        graph, found = capture(lambda: results(first))
        graph.replay()
        assert all(torch.equal(found[name], expected[0][name]) for name in found)
        for name, tensor in first.items():
            tensor.copy_(second[name])
        graph.replay()
        assert all(torch.equal(found[name], expected[1][name]) for name in found)
