"""The Triton kernels of window attention: without a GPU in the interpreter against float64; on one against float64 too,
for equal bits, and in a graph (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import KernelError, ShapeError
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import attention_backward_triton as backward
from nmoe.kernels.native import attention_tiles_triton as tiles
from nmoe.kernels.native import attention_window_triton as forward
from nmoe.kernels.native.attention_window_triton import window_attention

ROUNDING = 2.0**-8
"""Of bf16 to nearest, relative; the interpreter cuts off instead, which is twice that."""

RESULTS = ("out", "dq", "dk", "dv")

CASES = {
    "odd_window-BSHd": (1, 2, 150, 64, 64, 50),
    "odd_window-part": (2, 1, 150, 64, 64, 77),
    "itself_only-BSHd": (1, 1, 70, 192, 128, 1),
    "all-BSHd": (1, 2, 40, 128, 128, 100),
    "whole_blocks-BHSd": (1, 1, 256, 128, 128, 128),
    "mla-part": (1, 2, 197, 192, 128, 65),
    "odd_widths-BSHd": (1, 3, 130, 48, 80, 33),
    "odd_widths-odd": (1, 1, 90, 112, 16, 40),
    "wide_window-BSHd": (1, 1, 420, 32, 32, 300),
    "one-BHSd": (2, 1, 1, 64, 64, 5),
}
"""B, H, S, d, v, window, and how the tensors lie in memory."""


def draw(case: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32."""
    batch, heads, length, width, value, window = CASES[case]
    generator = torch.Generator().manual_seed(list(CASES).index(case))
    drawn = {
        name: torch.randn(batch, heads, length, columns, generator=generator).bfloat16().float().numpy()
        for name, columns in (("q", width), ("k", width), ("v", value), ("dout", value))
    }
    numbers = {"scale": np.array(1.5 * width**-0.5), "window": np.array(window)}
    return drawn | numbers | {"layout": np.array(case.split("-")[1])}


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float, window: int
) -> list[torch.Tensor]:
    """Output and gradients by autograd in float64, wherever the tensors are."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    score = (wide[0] @ wide[1].mT * scale).masked_fill((distance < 0) | (distance >= window), float("-inf"))
    out = score.softmax(-1) @ wide[2]
    return [out.detach(), *torch.autograd.grad(out, wide, dout.double())]


def exact_case(case: dict[str, np.ndarray], **changes: float) -> list[torch.Tensor]:
    tensors = [torch.from_numpy(case[name]) for name in ("q", "k", "v", "dout")]
    return exact(*tensors, **({"scale": float(case["scale"]), "window": int(case["window"])} | changes))


def wrong(found: list[torch.Tensor], expected: list[torch.Tensor], rounding: float) -> set[str]:
    """Results that are not within two roundings of the norm (probabilities and results are rounded once each, and the
    errors of a sum's terms are independent) or of which some row is not within eight of the usual row's norm."""
    refused = set()
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        row_error, row_norm = (a.detach().double() - b).norm(dim=-1), b.norm(dim=-1)
        usual = row_norm.square().mean().sqrt().clamp_min(1e-2)  # a lone key's score has a gradient of 0
        if not (row_error.square().mean().sqrt() <= 2 * rounding * usual and (row_error <= 8 * rounding * usual).all()):
            refused.add(name)
    return refused


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    """Results by case and name, from one run of the interpreter."""
    return interpret("attention_window_interpreted.py", {case: draw(case) for case in CASES})


@pytest.mark.parametrize("case", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    found = [torch.from_numpy(interpreted[f"{case}/{name}"]) for name in RESULTS]
    assert wrong(found, exact_case(draw(case)), 2 * ROUNDING) == set()


@pytest.mark.parametrize("case", CASES)
def test_results_are_dense_with_heads_side_by_side(interpreted: dict[str, np.ndarray], case: str) -> None:
    _, heads, length, width, value, _ = CASES[case]
    expected = [[length * heads * n, n, heads * n, 1] for n in (value, width, width, value)]
    assert interpreted[f"{case}/strides"].tolist() == expected


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        ("odd_window-BSHd", {"window": 49}),
        ("odd_window-BSHd", {"window": 51}),
        ("whole_blocks-BHSd", {"window": 127}),
        ("whole_blocks-BHSd", {"window": 129}),
        ("mla-part", {"scale": 192**-0.5}),
    ],
)
def test_the_bounds_tell_mistakes_apart(
    interpreted: dict[str, np.ndarray], case: str, mistake: dict[str, float]
) -> None:
    found = [torch.from_numpy(interpreted[f"{case}/{name}"]) for name in RESULTS]
    assert wrong(found, exact_case(draw(case), **mistake), 2 * ROUNDING) == set(RESULTS)


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BHSd": heads(1, 2, 4, 72), "k_BHSd": heads(1, 2, 4, 72)}, "multiples of 16.* found 72 and 32: pad them"),
        ({"q_BHSd": heads(1, 2, 4, 208), "k_BHSd": heads(1, 2, 4, 208)}, "up to 192 .* found 208 and 32: pad them"),
        ({"v_BHSv": heads(1, 2, 4, 144)}, "values up to 128; found 48 and 144: pad them"),
        ({"v_BHSv": heads(1, 2, 4, 0)}, "found 48 and 0"),
        ({"q_BHSd": heads(1, 2, 3, 48)}, "as many queries as keys, found 3 and 4: call nmoe.kernels.reference"),
        ({"k_BHSd": heads(1, 2, 4, 48, dtype=torch.float32)}, "torch.bfloat16, torch.float32, .* convert them"),
        ({"k_BHSd": heads(1, 2, 4, 48, device="meta")}, "one device, found cpu, meta: move"),
        ({"k_BHSd": heads(1, 1, 4, 48)}, r"expected q \(B, H, S, d\)"),
        ({"window": 0}, "window of at least 1; found 0"),
        ({"scale": 0.0}, "scale above 0, found 0.0: set runtime.kernels = 'reference'"),
        ({"scale": -0.1}, "found -0.1"),
        ({"scale": float("nan")}, "found nan"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"q_BHSd": heads(1, 2, 4, 48), "k_BHSd": heads(1, 2, 4, 48), "v_BHSv": heads(1, 2, 4, 32)}
    error = KernelError if "scale" in changes else ShapeError
    with pytest.raises(error, match=message):
        window_attention(**(given | {"scale": 0.1, "window": 2} | changes))


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0)])
def test_nothing_needs_no_kernel(shape: tuple[int, int, int]) -> None:
    given = [heads(*shape, n).requires_grad_() for n in (48, 48, 32)]
    out = window_attention(*given, scale=0.1, window=2)
    grads = torch.autograd.grad(out, given, torch.ones_like(out))
    assert [tuple(tensor.shape) for tensor in (out, *grads)] == [(*shape, n) for n in (32, 48, 48, 32)]


def test_shapes_and_strides_are_known_without_data() -> None:
    """As a compiled model asks for them."""
    with FakeTensorMode():
        given = [torch.empty(2, 3, 5, n).bfloat16().requires_grad_() for n in (48, 48, 32)]
        out = window_attention(*given, scale=0.1, window=2)
        grads = torch.autograd.grad(out, given, torch.empty_like(out))
    for tensor, width in zip((out, *grads), (32, 48, 48, 32), strict=True):
        assert (tensor.shape, tensor.dtype) == ((2, 3, 5, width), torch.bfloat16)
        assert tensor.stride() == (15 * width, width, 3 * width, 1)


def test_only_what_tma_cannot_read_is_copied() -> None:
    dense = torch.zeros(2, 3, 5, 64).bfloat16()
    readable = [dense, dense.transpose(1, 2), dense[..., 16:48], dense[:, :, 1:3]]
    readable.append(dense.as_strided((2, 1, 5, 64), (960, 3, 64, 1)))  # a lone head's stride is never used
    assert all(tiles.for_tma(tensor) is tensor for tensor in readable)
    assert tiles.describe(readable[-1], 64, 64).strides == [960, 64, 64, 1]
    others = [dense[..., 1:33], dense.mT, dense[:, :1].expand(-1, 3, -1, -1), dense[..., ::2]]
    others.append(torch.zeros(2, 3, 5, 68).bfloat16()[..., :64])
    for tensor in others:
        copy = tiles.for_tma(tensor)
        assert copy.is_contiguous()
        assert copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    ("width", "value", "expected"),
    [
        (192, 128, (128, 64, 128)),
        (128, 128, (128, 0, 128)),
        (64, 64, (64, 0, 64)),
        (48, 80, (32, 16, 128)),
        (112, 16, (64, 64, 16)),
        (16, 32, (16, 0, 32)),
    ],
)
def test_a_width_is_the_sum_of_two_powers_of_two(width: int, value: int, expected: tuple[int, int, int]) -> None:
    assert tuple(tiles.widths_of(width, value)) == expected


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        assert argument.dtype == torch.float32
        return "*fp32"
    if isinstance(argument, (int, float)):
        return {int: "i32", float: "fp32"}[type(argument)]
    assert argument.base.dtype == torch.bfloat16
    return f"tensordesc<bf16{argument.block_shape}>"


@pytest.mark.parametrize(("width", "value", "reach"), tiles.TILES["sm_90a"])
@pytest.mark.parametrize("arch", tiles.TILES)
def test_what_is_compiled_ahead_is_what_is_launched(
    arch: str, width: int, value: int, reach: tiles.Reach, launches_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a program for every block of positions of every head."""
    places = ((forward, "_window_attention_kernel"), (backward, "_dq_kernel"), (backward, "_dkdv_kernel"))
    launched = [launches_of(*place) for place in places]
    monkeypatch.setattr(tiles, "_tiles_by_widths", lambda device: tiles.TILES[arch])
    given = [torch.zeros(2, 600, 3, n).bfloat16().transpose(1, 2).requires_grad_() for n in (width, width, value)]
    out = window_attention(*given, scale=0.1, window={"narrow": 128, "wide": 512, "all": 2000}[reach])
    torch.autograd.grad(out, given, torch.zeros_like(out))
    listed = {kernel.name: kernel for kernel in (*forward.TRITON_KERNELS, *backward.TRITON_KERNELS)}
    table = tiles.TILES[arch][width, value, reach]
    rows = (table.forward.queries, table.dq.queries, table.dkdv.keys)
    for launch, name, owned in zip(launched, ("window_attention", "attention_dq", "attention_dkdv"), rows, strict=True):
        kernel = listed[f"{name}_{width}_{value}_{reach}_{arch}"]
        assert launch.grid == (2 * 3 * -(-600 // owned),)
        assert [type_of(argument) for argument in launch.args] == [kind for _, kind in kernel.signature]
        assert launch.options == dict((*kernel.constants, *kernel.options))


# On the GPU at hand.

ON_GPU = [
    (2, 3, 300, 64, 64, 100),
    (2, 2, 129, 128, 128, 128),
    (1, 4, 700, 192, 128, 512),
    (2, 2, 257, 192, 128, 1),
    (1, 2, 50, 192, 128, 64),
    (1, 2, 333, 80, 48, 65),
    (1, 2, 4096, 128, 128, 128),
    (1, 2, 4096, 192, 128, 512),
    (2, 2, 2048, 64, 64, 512),
]
"""B, H, S, d, v, window."""


def on_gpu(size: tuple[int, ...], gpu: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    batch, n_heads, length, width, value, _ = size
    q, k, v, dout = (
        torch.randn(batch, length, n_heads, n, device=gpu).bfloat16().transpose(1, 2)
        for n in (width, width, value, value)
    )
    return [tensor.requires_grad_() for tensor in (q, k, v)], dout


def results(given: list[torch.Tensor], dout: torch.Tensor, window: int) -> list[torch.Tensor]:
    out = window_attention(*given, scale=1.5 * given[0].shape[3] ** -0.5, window=window)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("size", ON_GPU)
    def test_equals_float64(self, gpu: str, size: tuple[int, ...]) -> None:
        """And the same bits again, also while other work runs."""
        given, dout = on_gpu(size, gpu)
        found = results(given, dout, size[-1])
        assert wrong(found, exact(*given, dout, 1.5 * size[3] ** -0.5, size[-1]), ROUNDING) == set()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        noise = torch.randn(2048, 2048, device=gpu)
        for _ in range(5):
            with torch.cuda.stream(side):
                noise = (noise @ noise).clamp(-1, 1)
            assert all(torch.equal(a, b) for a, b in zip(found, results(given, dout, size[-1]), strict=True))
        torch.cuda.current_stream().wait_stream(side)

    def test_gradients_of_any_layout(self, gpu: str) -> None:
        """An expanded one, and one that starts where TMA cannot: the bits of a dense one."""
        size = (2, 3, 200, 192, 128, 70)
        given, dout = on_gpu(size, gpu)
        row = dout[:, :, :1]
        expected = results(given, row.expand(-1, -1, 200, -1).contiguous(), 70)
        assert all(
            torch.equal(a, b) for a, b in zip(results(given, row.expand(-1, -1, 200, -1), 70), expected, strict=True)
        )
        odd = torch.nn.functional.pad(dout, (1, 2))[..., 1:-2]
        assert odd.data_ptr() % 16
        for a, b in zip(results(given, odd, 70), results(given, dout, 70), strict=True):
            assert torch.equal(a, b)

    def test_a_captured_graph_reads_new_inputs(self, gpu: str, capture: Any) -> None:
        size = (2, 4, 300, 192, 128, 128)
        first, second = on_gpu(size, gpu), on_gpu(size, gpu)
        expected = [results(*first, 128), results(*second, 128)]
        graph, found = capture(lambda: results(*first, 128))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected[0], strict=True))
        for old, new in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
            old.detach().copy_(new.detach())
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected[1], strict=True))

    def test_places_beyond_2_to_31(self, gpu: str) -> None:
        """The last positions of tensors whose elements no int32 counts: the bits of a batch of these alone."""
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("needs 60 GiB of free device memory")
        length, last, window = 5888 * 128, 512, 100
        assert length * 16 * 192 > 1 << 31
        q, k, v, dout = (
            torch.zeros(1, length, 16, n, dtype=torch.bfloat16, device=gpu).transpose(1, 2)
            for n in (192, 192, 128, 128)
        )
        for tensor in (q, k, v, dout):
            tensor[:, :, -last:].normal_()
        small = [tensor[:, :, -last:].clone().requires_grad_() for tensor in (q, k, v)]
        expected = results(small, dout[:, :, -last:].clone(), window)
        found = results([tensor.requires_grad_() for tensor in (q, k, v)], dout, window)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[:, :, window - last :], b[:, :, window - last :]), "of what sees only these"
        del q, k, v, dout, found
        torch.cuda.empty_cache()
