"""The router's gradient added to its tokens': in Triton's interpreter, compiled for Hopper and Blackwell, and on the
GPU at hand.

Operands are small integers, and eighths in the addend, so that fp32 holds every sum whatever its order: results are
then float64's, rounded once. Random reals are compared on the GPU, with bounds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels import router
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.catalog import triton_kernels

pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import router_triton
from nmoe.kernels.native.router_triton import add_router_gradient

CASES = ["1-8-3", "16-64-32", "5-257-100", "257-8-64", "100-64-1", "33-100-257", "64-3-8", "17-1-64", "20-70-0"]
"""T, D and E; tiles of the interpreter are 16 × 64, in steps of 32."""

NONE = ["0-8-3", "8-0-3", "0-0-0"]


def draw(case: str) -> dict[str, np.ndarray]:
    n_tokens, width, n_experts = (int(size) for size in case.split("-"))
    rng = np.random.default_rng([n_tokens, width, n_experts])
    sizes = {"addend": (n_tokens, width), "gradient": (n_tokens, n_experts), "weight": (n_experts, width)}
    limits = {"addend": 255, "gradient": 9, "weight": 9}
    drawn = {name: rng.integers(-limits[name], limits[name] + 1, size) for name, size in sizes.items()}
    return {name: (array / (8 if name == "addend" else 1)).astype(np.float32) for name, array in drawn.items()}


def rounded(exact: np.ndarray) -> np.ndarray:
    """To bf16; fp32 holds what is given."""
    return torch.from_numpy(exact).float().bfloat16().double().numpy()


def product(case: dict[str, np.ndarray]) -> np.ndarray:
    return case["gradient"].astype(np.float64) @ case["weight"].astype(np.float64)


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results by `<case>/<name>`, from one run of the interpreter."""
    return interpret("router_interpreted.py", {case: draw(case) for case in (*CASES, *NONE)})


@pytest.mark.parametrize("case", [*CASES, *NONE])
def test_interpreted_equals_float64_rounded_once(interpreted: dict[str, np.ndarray], case: str) -> None:
    drawn = draw(case)
    assert np.array_equal(interpreted[f"{case}/out"], rounded(product(drawn) + drawn["addend"]))
    assert (interpreted[f"{case}/beyond"] == 0).all()


@pytest.mark.parametrize(
    "mistake", ["rounded twice", "addend left out", "product left out", "token before", "expert before", "last expert"]
)
def test_the_oracle_tells_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    drawn = draw("33-100-257")
    wrong = product(drawn) + drawn["addend"]
    if mistake == "rounded twice":
        wrong = rounded(product(drawn)) + drawn["addend"]
    elif mistake == "addend left out":
        wrong = product(drawn)
    elif mistake == "product left out":
        wrong = drawn["addend"].astype(np.float64)
    elif mistake == "token before":
        wrong = product(drawn) + np.roll(drawn["addend"], 1, 0)
    elif mistake == "expert before":
        wrong = product(drawn | {"weight": np.roll(drawn["weight"], 1, 0)}) + drawn["addend"]
    else:
        drawn["weight"][256:] = 0
        wrong = product(drawn) + drawn["addend"]
    assert (interpreted["33-100-257/out"] != rounded(wrong)).mean() > 0.05


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_compiles_for_two_programs_a_multiprocessor(arch: str, ahead: Any) -> None:
    """Half of its registers and shared memory each, nothing in local memory; the arch's tensor cores; and 16 bytes in
    every access."""
    (kernel,) = router_triton.TRITON_KERNELS
    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    assert compiled.resources.registers <= 128
    assert 2 * compiled.resources.shared_bytes <= 227 << 10
    text = ahead.ptx(kernel, compiled)
    assert ("wgmma.mma_async" in text) == (arch == "sm_90a")
    assert ("tcgen05.mma" in text) == (arch == "sm_100a")
    assert "mma.sync" not in text
    # A thread's share of a tile, 64 elements of 256 threads'.
    assert text.count("ld.global.v4.b32") == text.count("ld.global") == 8
    assert text.count("st.global.v4.b32") == text.count("st.global") == 8
    assert text.count("cp.async.cg.shared.global") >= 16, "both operands, two steps"


def test_what_is_compiled_ahead_is_what_is_launched(launches_of, monkeypatch: pytest.MonkeyPatch) -> None:
    (listed,) = [kernel for kernel in triton_kernels() if kernel.function == "_add_router_gradient_kernel"]
    names = router_triton._add_router_gradient_kernel.arg_names
    launches = launches_of(router_triton, "_add_router_gradient_kernel")
    monkeypatch.setattr(router_triton, "_INTERPRETED", router_triton._TILE)
    add_router_gradient(*(torch.zeros(shape).bfloat16() for shape in ((300, 272), (300, 2, 48), (48, 272))))
    assert launches.grid == (3 * 3,)
    types = ["*bf16" if isinstance(x, torch.Tensor) else "i32" for x in launches.args]
    assert listed.signature == tuple(zip(names, types, strict=False))
    assert launches.args[4:] == (300, 272, 48)
    assert dict(listed.constants) | dict(listed.options) == launches.options
    assert [name for name, _ in listed.constants] == names[len(types) :]
    assert set(listed.aligned) == set(names[: len(types)]) - {"n_tokens"}, "any number of tokens has one compile"


ADDEND, PARTS, WEIGHT = (torch.zeros(shape).bfloat16() for shape in ((6, 8), (6, 2, 3), (3, 8)))
WIDE = 1 << 23


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"addend_TD": ADDEND.float()}, "expected addend of 2 dimensions and torch.bfloat16, contiguous; found"),
        ({"addend_TD": ADDEND[0]}, r"expected addend of 2 dimensions .* found \(8,\)"),
        ({"addend_TD": ADDEND[:1].expand(6, 8)}, r"expected addend .* strides \(0, 1\): .* call .contiguous"),
        ({"parts_T2E": PARTS[:, 0]}, "expected parts of 3 dimensions"),
        ({"parts_T2E": PARTS.half()}, "expected parts .* of torch.float16"),
        ({"parts_T2E": PARTS.mT.contiguous().mT}, r"expected parts .* strides \(6, 1, 2\)"),
        ({"weight_ED": WEIGHT.double()}, "expected weight .* of torch.float64"),
        ({"weight_ED": WEIGHT.t().contiguous().t()}, "expected weight .* contiguous"),
        ({"parts_T2E": PARTS[:5]}, r"expected parts \(T, 2, E\) and weight \(E, D\) for addend \(6, 8\); found \(5, 2"),
        ({"parts_T2E": torch.zeros(6, 3, 3).bfloat16()}, r"expected parts \(T, 2, E\) .* found \(6, 3, 3\)"),
        ({"weight_ED": WEIGHT[:2]}, r"expected parts .* found \(6, 2, 3\) and \(2, 8\)"),
        ({"addend_TD": torch.zeros(6, 7).bfloat16()}, r"weight \(E, D\) for addend \(6, 7\)"),
        ({"weight_ED": meta(3, 8)}, "expected all tensors on one device; found cpu, cpu and meta"),
        (
            {"addend_TD": meta(6, WIDE), "parts_T2E": meta(6, 2, 3), "weight_ED": meta(3, WIDE)},
            r"expected fewer than 2\^23 .* found 8388608 and 3",
        ),
        ({"parts_T2E": meta(6, 2, WIDE), "weight_ED": meta(WIDE, 8)}, r"expected fewer than 2\^23"),
    ],
)
def test_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        add_router_gradient(**({"addend_TD": ADDEND, "parts_T2E": PARTS, "weight_ED": WEIGHT} | changed))


# On the GPU at hand.

GPU_CASES = ["1-8-3", "127-128-64", "129-257-100", "300-576-64", "257-1000-257", "1000-2048-128", "8-16-1", "40-96-0"]


def on_gpu(gpu: str, case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_router_gradient`'s operands, the second part NaN."""
    drawn = {name: torch.from_numpy(array).bfloat16().to(gpu) for name, array in draw(case).items()}
    nan = torch.full_like(drawn["gradient"], torch.nan)
    return drawn["addend"], torch.stack((drawn["gradient"], nan), 1), drawn["weight"]


def reals(gpu: str, *sizes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_tokens, width, n_experts = sizes
    shapes = ((n_tokens, width), (n_tokens, 2, n_experts), (n_experts, width))
    return tuple(torch.randn(shape, device=gpu).bfloat16() for shape in shapes)  # type: ignore[return-value]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("case", [*GPU_CASES, *NONE])
    def test_equals_float64_rounded_once(self, gpu: str, case: str) -> None:
        """And the addend stays as it is."""
        addend, parts, weight = on_gpu(gpu, case)
        before = addend.clone()
        # The allocator gives freed memory of the same size again: an element that is not written must not look right.
        poison = [torch.full_like(addend, torch.nan) for _ in range(4)]
        del poison
        found = add_router_gradient(addend, parts, weight)
        drawn = draw(case)
        assert np.array_equal(found.double().cpu().numpy(), rounded(product(drawn) + drawn["addend"]))
        assert torch.equal(addend, before)

    @pytest.mark.parametrize("sizes", [(1000, 2048, 64), (513, 520, 256), (77, 33, 65)])
    def test_reals(self, gpu: str, sizes: tuple[int, int, int]) -> None:
        """One rounding to bf16 (2^-8 of the value), and 2^-22 of the sum of magnitudes for each addition, which tensor
        cores may truncate. Repeats give the same bits."""
        addend, parts, weight = reals(gpu, *sizes)
        found = add_router_gradient(addend, parts, weight)
        a, g, w = addend.double(), parts[:, 0].double(), weight.double()
        exact, terms = a + g @ w, a.abs() + g.abs() @ w.abs()
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + (sizes[2] + 1) * 2**-22 * terms).all()
        for _ in range(5):
            again = add_router_gradient(addend, parts, weight)
            assert torch.equal(found.view(torch.int16), again.view(torch.int16))

    def test_in_a_cuda_graph(self, gpu: str) -> None:
        """A replay sees the values of its time."""
        operands = reals(gpu, 300, 576, 64)
        first = add_router_gradient(*operands)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = add_router_gradient(*operands)
        for tensor in operands:
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert torch.equal(captured, add_router_gradient(*operands))
        assert not torch.equal(captured, first)

    def test_the_router_takes_it(self, gpu: str, capture: Any) -> None:
        """The gradient of tokens that others read too has the kernel's bits, in a captured backward too."""
        from nmoe.kernels.native.split_cuda import split

        x = torch.randn(300, 576, device=gpu).bfloat16().requires_grad_()
        weight = torch.randn(64, 576, device=gpu).requires_grad_()
        dlogits, addend = torch.randn(300, 64, device=gpu), torch.randn(300, 576, device=gpu).bfloat16()

        def gradient() -> torch.Tensor:
            outputs = router.router_logits_and_tokens(x, weight)
            return torch.autograd.grad(outputs, (x, weight), (dlogits, addend))[0]

        expected = add_router_gradient(addend, split(dlogits, 2), weight.detach().bfloat16())
        assert torch.equal(gradient(), expected)
        graph, captured = capture(gradient)
        graph.replay()
        assert torch.equal(captured, expected)

    def test_places_beyond_2_to_31(self, gpu: str) -> None:
        """Elements of (T, D) that no int32 counts: only the last rows are looked at."""
        if torch.cuda.mem_get_info()[0] < 16 << 30:
            pytest.skip("needs 16 GiB of free device memory")
        n_tokens, width, n_experts, few = (1 << 16) + 100, 1 << 15, 16, 200
        addend = torch.zeros(n_tokens, width, dtype=torch.bfloat16, device=gpu)
        _, parts, weight = reals(gpu, n_tokens, 8, n_experts)
        weight = torch.randn(n_experts, width, device=gpu).bfloat16()
        addend[-few:].normal_()
        found = add_router_gradient(addend, parts, weight)[-few:].double()
        exact = addend[-few:].double() + parts[-few:, 0].double() @ weight.double()
        assert (found - exact).norm() < 2**-8 * exact.norm()
