"""The Triton kernels of MLA's heads: without a GPU in the interpreter against float64, and compiled for Hopper and
Blackwell; on one, against float64 too (`-m gpu`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference import mla as reference

pytest.importorskip("triton", reason="Triton is for Linux")

ROUNDING = 2.0**-8
"""Of bf16 to nearest, relative; the interpreter cuts off instead, which is twice that."""

SIZES = {
    "usual": (2, 3, 16, 128, 64, 128),
    "two_blocks": (1, 4, 20, 24, 16, 40),
    "odd": (2, 5, 3, 5, 6, 7),
    "least": (1, 1, 1, 2, 2, 1),
    "many_heads": (3, 2, 33, 24, 16, 8),
}
"""B, S, H, n, r, v; a program takes 16 heads at a time."""

ORDERS = {"BSHd": (0, 2, 1, 3), "BHSd": (0, 1, 2, 3), "SBdH": (2, 0, 3, 1)}
"""Of the gradients' dimensions in memory; in the last, a row's numbers lie apart."""

CASES = [
    "usual-BSHd",
    "usual-BHSd",
    "two_blocks-SBdH",
    "two_blocks-BHSd",
    "odd-BSHd",
    "odd-SBdH",
    "odd-BHSd-dq",
    "odd-BSHd-dk",
    "odd-BHSd-dv",
    "least-BSHd",
    "many_heads-BHSd",
]
"""Sizes, order, and the only gradient that is defined."""

INPUTS, GRADIENTS = ("q", "kv", "k_rope"), ("dq", "dk", "dv")
RESULTS = ("q_out", "k_out", "v_out", "q_grad", "kv_grad", "k_rope_grad")


def draw(case: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32, and tables of fp32, 1.1 times longer than one as YaRN's may be."""
    name, order, *only = case.split("-")
    batch, length, heads, nope, rope, value = SIZES[name]
    generator = torch.Generator().manual_seed(CASES.index(case) if case in CASES else 99)
    sizes = {
        "q": (batch, length, heads, nope + rope),
        "kv": (batch, length, heads, nope + value),
        "k_rope": (batch, length, rope),
        "dq": (batch, heads, length, nope + rope),
        "dk": (batch, heads, length, nope + rope),
        "dv": (batch, heads, length, value),
    }
    drawn = {name: torch.randn(size, generator=generator).bfloat16().float() for name, size in sizes.items()}
    angle = torch.rand(length, rope // 2, generator=generator) * 6
    drawn |= {"cos": 1.1 * angle.cos(), "sin": 1.1 * angle.sin()}
    for name in GRADIENTS:
        if only and name not in only:
            del drawn[name]
    return {name: tensor.numpy() for name, tensor in drawn.items()} | {"order": np.array(ORDERS[order])}


def exact(case: dict[str, np.ndarray], heads: Callable[..., Any] = reference.mla_heads) -> dict[str, torch.Tensor]:
    """By autograd in float64."""
    wide = {name: torch.from_numpy(array).double() for name, array in case.items()}
    inputs = [wide[name].requires_grad_() for name in INPUTS]
    outputs = heads(*inputs, wide["cos"], wide["sin"])
    pairs = [(out, wide[name]) for name, out in zip(GRADIENTS, outputs, strict=True) if name in wide]
    total = sum((out * grad).sum() for out, grad in pairs) + sum(0 * tensor.sum() for tensor in inputs)
    return dict(zip(RESULTS, (*(t.detach() for t in outputs), *torch.autograd.grad(total, inputs)), strict=True))


def wrong_results(case: dict[str, np.ndarray], found: dict[str, torch.Tensor], rounding: float) -> set[str]:
    """Those that are not within one rounding to bf16 of float64, and fp32's own: 2^-22 of the two terms of a turn, and
    for each head of a sum 2^-23 of all its terms. What is only copied has its bits."""
    expected = exact(case)
    rope = case["k_rope"].shape[-1]
    bound = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for name, given in (("q_out", "q"), ("q_grad", "dq")):
        largest = float(np.abs(case[given]).max()) if given in case else 0.0
        bound[name][..., -rope:] = rounding * expected[name][..., -rope:].abs() + 2.0**-21 * largest
    if "dk" in case:
        terms = torch.from_numpy(case["dk"][..., -rope:]).double().abs().sum(1)
        bound["k_rope_grad"] = rounding * expected["k_rope_grad"].abs() + case["q"].shape[2] * 2.0**-23 * terms
    return {
        name
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape or not ((found[name].double() - tensor).abs() <= bound[name]).all()
    }


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Results by case and name, from one run of the interpreter."""
    results = interpret("mla_interpreted.py", {case: draw(case) for case in CASES})
    return {case: {name: torch.from_numpy(results[f"{case}/{name}"]) for name in RESULTS} for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, dict[str, torch.Tensor]], case: str) -> None:
    assert wrong_results(draw(case), interpreted[case], 2 * ROUNDING) == set()


def by_halves(x: np.ndarray, rope: int) -> np.ndarray:
    """As if number i of the turned part were paired with i + r/2."""
    order = np.arange(rope).reshape(2, -1).T.reshape(-1) + x.shape[-1] - rope
    return np.concatenate((x[..., :-rope], x[..., order]), -1)


MISTAKES: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], set[str]]] = {
    "turned the wrong way": (lambda c: {"sin": -c["sin"]}, {"q_out", "q_grad"}),
    "cos and sin exchanged": (lambda c: {"sin": c["cos"], "cos": c["sin"]}, {"q_out", "q_grad"}),
    "next position": (lambda c: {n: np.roll(c[n], 1, 0) for n in ("cos", "sin")}, {"q_out", "q_grad"}),
    "pairs by halves": (lambda c: {"q": by_halves(c["q"], 16)}, {"q_out"}),
    "turned part first": (lambda c: {"q": np.roll(c["q"], 16, -1)}, {"q_out"}),
    "value before key": (lambda c: {"kv": np.roll(c["kv"], 40, -1)}, {"k_out", "v_out"}),
    "next token's key": (lambda c: {"k_rope": np.roll(c["k_rope"], 1, 1)}, {"k_out"}),
    "a head left out of the sum": (
        lambda c: {"dk": c["dk"] * (np.arange(20) != 17)[:, None, None]},
        {"kv_grad", "k_rope_grad"},
    ),
    "next head's gradient": (lambda c: {"dv": np.roll(c["dv"], 1, 1)}, {"kv_grad"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, dict[str, torch.Tensor]], mistake: str) -> None:
    """The kernel's results against those of other inputs: exactly what these reach is refused."""
    case, (change, reached) = draw("two_blocks-BHSd"), MISTAKES[mistake]
    assert wrong_results(case | change(case), interpreted["two_blocks-BHSd"], 2 * ROUNDING) == reached


def inputs(**changes: Any) -> dict[str, torch.Tensor]:
    shapes = {"q_BSHd": (2, 3, 4, 9), "kv_BSHx": (2, 3, 4, 7), "k_rope_BSr": (2, 3, 4)}
    tensors = {name: torch.zeros(shape).bfloat16() for name, shape in shapes.items()}
    return tensors | {"cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)} | changes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"q_BSHd": torch.zeros(2, 3, 4, 9)},
            r"expected q, kv and k_rope of torch.bfloat16.*found torch.float32, .*conv",
        ),
        ({"kv_BSHx": torch.zeros(2, 3, 4, 7).half()}, r"found torch.bfloat16, torch.float16, .*convert them"),
        ({"cos": torch.zeros(3, 2).bfloat16()}, r"cos and sin of torch.float32; found .*: convert them, or set"),
        ({"sin": torch.zeros(3, 2).double()}, r"torch.float64: convert them, or set runtime.kernels = 'reference'"),
        ({"sin": torch.zeros(3, 2, device="meta")}, "expected all tensors on one device; found cpu, meta: move"),
        ({"k_rope_BSr": torch.zeros(2, 3, 6).bfloat16()}, r"expected q \(B, S, H, n \+ r\)"),
    ],
)
def test_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    from nmoe.kernels.native.mla_triton import mla_heads

    with pytest.raises(ShapeError, match=message):
        mla_heads(**inputs(**changed))


def test_no_tokens_need_no_kernel() -> None:
    from nmoe.kernels.native.mla_triton import mla_heads

    shapes = ((0, 3, 4, 9), (0, 3, 4, 7), (0, 3, 4))
    given = [torch.zeros(shape).bfloat16().requires_grad_() for shape in shapes]
    out = mla_heads(*given, torch.zeros(3, 2), torch.zeros(3, 2))
    grads = torch.autograd.grad(out, given, [torch.ones_like(t) for t in out])
    assert [tuple(tensor.shape) for tensor in (*out, *grads)] == [(0, 4, 3, 9), (0, 4, 3, 9), (0, 4, 3, 2), *shapes]


TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def test_what_is_compiled_ahead_is_what_is_launched(launches_of: Any) -> None:
    from nmoe.kernels.native import mla_triton as module

    forward, backward = (launches_of(module, name) for name in ("_mla_heads_kernel", "_mla_heads_backward_kernel"))
    given = [torch.zeros(2, 3, *size).bfloat16().requires_grad_() for size in ((16, 192), (16, 256), (64,))]
    out = module.mla_heads(*given, torch.zeros(3, 32), torch.zeros(3, 32))
    torch.autograd.grad(out, given, [torch.zeros_like(tensor) for tensor in out])
    for kernel, launched in zip(module.TRITON_KERNELS, (forward, backward), strict=True):
        assert launched.grid == (6,)
        types = [TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for x in launched.args]
        assert types == [kind for _, kind in kernel.signature]
        assert launched.options == dict((*kernel.constants, *kernel.options))
        for (name, _), x in zip(kernel.signature, launched.args, strict=True):
            if name in kernel.aligned:
                assert (x.data_ptr() if isinstance(x, torch.Tensor) else x) % 16 == 0, name


def catalog() -> list[Any]:
    from nmoe.kernels.native.mla_triton import TRITON_KERNELS

    return [
        pytest.param(kernel, arch, id=f"{kernel.name}-{arch}") for kernel in TRITON_KERNELS for arch in kernel.arches
    ]


@pytest.mark.parametrize(("kernel", "arch"), catalog())
def test_compiles_to_loads_of_16_bytes(kernel: Any, arch: str, ahead: Any) -> None:
    """No other loads from memory, no fused multiply-add, and forward nothing between threads."""
    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    text = ahead.ptx(kernel, compiled)
    assert f".target {arch}" in text
    assert text.count("ld.global") == text.count("ld.global.v4.b32") >= 8
    assert text.count("st.global.v4.b32") >= 6
    assert "fma.rn" not in text
    assert ("bar.sync" in text) == (kernel.function == "_mla_heads_backward_kernel"), "heads are summed there"


# On the GPU at hand.


def on_gpu(case: dict[str, np.ndarray], gpu: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Inputs, tables and gradients, these in the case's order in memory."""
    there = {name: torch.from_numpy(array).to(gpu) for name, array in case.items()}
    order = case["order"].tolist()
    back = [order.index(dim) for dim in range(4)]
    given = [there[name].bfloat16().requires_grad_() for name in INPUTS]
    grads = [there[name].bfloat16().permute(order).contiguous().permute(back) for name in GRADIENTS]
    return given, [there["cos"], there["sin"]], grads


def results(given: list[torch.Tensor], tables: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    from nmoe.kernels.native.mla_triton import mla_heads

    out = mla_heads(*given, *tables)
    return [*(tensor.detach() for tensor in out), *torch.autograd.grad(out, given, grads)]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("name", SIZES)
    def test_equals_float64(self, gpu: str, name: str, order: str) -> None:
        """And the same bits again."""
        case = draw(f"{name}-{order}")
        there = on_gpu(case, gpu)
        found = results(*there)
        named = dict(zip(RESULTS, (tensor.float().cpu() for tensor in found), strict=True))
        assert wrong_results(case, named, ROUNDING) == set()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(found, results(*there), strict=True))

    def test_through_attention(self, gpu: str) -> None:
        """With the native attention after it, against float64: norms within three roundings to bf16, one here and two
        of attention."""
        case = draw("usual-BSHd")
        sizes = {"q": (2, 77, 16, 192), "kv": (2, 77, 16, 256), "k_rope": (2, 77, 64)}
        case = {name: torch.randn(size).bfloat16().float().numpy() for name, size in sizes.items()} | {
            name: np.resize(case[name], (77, 32)) for name in ("cos", "sin")
        }
        dout = torch.randn(2, 16, 77, 128).bfloat16()
        native = select_ops("native", gpu)
        given = [torch.from_numpy(case[name]).bfloat16().to(gpu).requires_grad_() for name in INPUTS]
        tables = [torch.from_numpy(case[name]) for name in ("cos", "sin")]
        out = native.attention(*native.mla_heads(*given, *(t.to(gpu) for t in tables)), scale=192**-0.5)
        found = [out, *torch.autograd.grad(out, given, dout.to(gpu))]

        wide = [torch.from_numpy(case[name]).double().requires_grad_() for name in INPUTS]
        q, k, v = reference.mla_heads(*wide, *(t.double() for t in tables))
        later = torch.ones(77, 77, dtype=torch.bool).triu(1)
        expected = (q @ k.mT * 192**-0.5).masked_fill(later, float("-inf")).softmax(-1) @ v
        exact = [expected, *torch.autograd.grad(expected, wide, dout.double())]
        for a, b in zip(found, exact, strict=True):
            assert float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm()) < 3 * ROUNDING

    def test_a_captured_graph_reads_new_inputs(self, gpu: str, capture: Any) -> None:
        first, second = (on_gpu(draw(f"usual-{order}"), gpu) for order in ("BSHd", "BSHd"))
        with torch.no_grad():
            for tensor in (*second[0], *second[2]):
                tensor.mul_(-1.5).add_(0.25)
        expected = [results(*first), results(*second)]
        graph, found = capture(lambda: results(*first))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected[0], strict=True))
        for old, new in zip((*first[0], *first[2]), (*second[0], *second[2]), strict=True):
            old.detach().copy_(new.detach())
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected[1], strict=True))

    def test_places_beyond_2_to_31(self, gpu: str) -> None:
        """The last tokens of a batch whose elements no int32 counts: the bits of a batch of these alone."""
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("needs 60 GiB of free device memory")
        length, heads, last = 750_000, 16, 5
        shapes = ((1, length, heads, 192), (1, length, heads, 256), (1, length, 64))
        given = [torch.empty(shape, dtype=torch.bfloat16, device=gpu) for shape in shapes]
        tables = [torch.randn(length, 32, device=gpu) for _ in range(2)]
        grads = [torch.empty(1, heads, length, width, dtype=torch.bfloat16, device=gpu) for width in (192, 192, 128)]
        assert grads[0].stride(1) * (heads - 1) > 1 << 31
        for tensor in given:
            tensor[:, -last:].normal_()
        for tensor in grads:
            tensor[:, :, -last:].normal_()
        small = [tensor[:, -last:].clone().requires_grad_() for tensor in given]
        expected = results(small, [t[-last:] for t in tables], [t[:, :, -last:] for t in grads])
        found = results([tensor.requires_grad_() for tensor in given], tables, grads)
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(a[:, :, -last:], b)
        for a, b in zip(found[3:], expected[3:], strict=True):
            assert torch.equal(a[:, -last:], b)
        del given, grads, found
        torch.cuda.empty_cache()
