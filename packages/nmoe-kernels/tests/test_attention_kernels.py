"""The kernels of attention: Triton's without a GPU in the interpreter against float64; all on one against float64 too,
for equal bits, and in a graph (`-m gpu`)."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import KernelError, ShapeError
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import attention as native
from nmoe.kernels.native import attention_backward_cuda, attention_cudnn, attention_forward_cuda, attention_wide_cuda
from nmoe.kernels.native import attention_backward_triton as backward
from nmoe.kernels.native import attention_tiles_triton as tiles
from nmoe.kernels.native import attention_window_triton as forward
from nmoe.kernels.native.attention import attend

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

DOCUMENTS = {
    "one_and_some-BSHd": ((2, 1, 150, 64, 64, 50), [[150], [70, 1, 29, 50]]),
    "ends_at_tiles-BSHd": ((1, 1, 256, 128, 128, 128), [[64, 128, 32, 32]]),
    "ends_beside_tiles-part": ((2, 1, 256, 64, 64, 2000), [[63, 66, 64, 63], [127, 66, 63]]),
    "last_alone-BSHd": ((1, 1, 193, 192, 128, 2000), [[192, 1]]),
    "first_alone-BHSd": ((1, 1, 129, 192, 128, 300), [[1, 128]]),
    "many_short-part": ((1, 2, 130, 48, 80, 2000), [[7, 1, 12, 30, 3, 17, 40, 20]]),
    "each_alone-BSHd": ((1, 1, 70, 32, 32, 2000), [[1] * 70]),
    "two_of_whole_tiles-BSHd": ((1, 1, 256, 64, 64, 2000), [[128, 128]]),
}
"""Of cases in documents, the same and each sample's lengths."""


def starts_of(lengths_B: Sequence[Sequence[int]]) -> torch.Tensor:
    """int32 (B, S): at each position the first of its document."""
    rows = [np.repeat(np.cumsum([0, *lengths[:-1]]), lengths) for lengths in lengths_B]
    return torch.from_numpy(np.stack(rows).astype(np.int32))


def draw(case: str) -> dict[str, np.ndarray]:
    """Numbers of bf16, as fp32."""
    batch, heads, length, width, value, window = CASES[case] if case in CASES else DOCUMENTS[case][0]
    generator = torch.Generator().manual_seed([*CASES, *DOCUMENTS].index(case))
    drawn = {
        name: torch.randn(batch, heads, length, columns, generator=generator).bfloat16().float().numpy()
        for name, columns in (("q", width), ("k", width), ("v", value), ("dout", value))
    }
    numbers = {"scale": np.array(1.5 * width**-0.5), "window": np.array(window)}
    start = {"start": starts_of(DOCUMENTS[case][1]).numpy()} if case in DOCUMENTS else {}
    return drawn | numbers | start | {"layout": np.array(case.split("-")[1])}


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
    window: int,
    start_BS: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Output and gradients by autograd in float64, wherever the tensors are."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= window)
    if start_BS is not None:
        hidden = hidden | (position < start_BS[:, None, :, None])
    score = (wide[0] @ wide[1].mT * scale).masked_fill(hidden, float("-inf"))
    out = score.softmax(-1) @ wide[2]
    return [out.detach(), *torch.autograd.grad(out, wide, dout.double())]


def exact_case(case: dict[str, np.ndarray], *, late: int = 0, **changes: float) -> list[torch.Tensor]:
    """With documents that start `late` positions late (a mistake)."""
    tensors = [torch.from_numpy(case[name]) for name in ("q", "k", "v", "dout")]
    arguments = {"scale": float(case["scale"]), "window": int(case["window"])} | changes
    start_BS = None
    if "start" in case:
        start_BS = torch.from_numpy(case["start"])
        start_BS = (start_BS + late).clamp(min=0).minimum(torch.arange(start_BS.shape[1]))
    return exact(*tensors, **arguments, start_BS=start_BS)


def wrong(found: list[torch.Tensor], expected: list[torch.Tensor], rounding: float) -> set[str]:
    """Results that are not within two roundings of the norm (probabilities and results are rounded once each, and the
    errors of a sum's terms are independent) or of which some row is not within 16 of the usual row's norm or its own:
    the gradient of a query that sees few keys is large, or a small difference from a sum over the rounded output."""
    refused = set()
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        row_error, row_norm = (a.detach().double() - b).norm(dim=-1), b.norm(dim=-1)
        usual = row_norm.square().mean().sqrt().clamp_min(1e-2)  # a lone key's score has a gradient of 0
        rows_fit = (row_error <= 16 * rounding * row_norm.clamp_min(usual)).all()
        if not (row_error.square().mean().sqrt() <= 2 * rounding * usual and rows_fit):
            refused.add(name)
    return refused


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, np.ndarray]:
    """Results by case and name, from one run of the interpreter."""
    cases = {case: draw(case) for case in (*CASES, *DOCUMENTS)}
    cases |= {f"{case} in one document": in_one_document(case) for case in ("odd_window-BSHd", "all-BSHd")}
    cases |= {f"{case} not a number": poisoned(TWO_OF_WHOLE_TILES, place) for case, place in HALVES.items()}
    return interpret("attention_interpreted.py", cases)


TWO_OF_WHOLE_TILES = "two_of_whole_tiles-BSHd"
HALVES = {"first": slice(0, 128), "second": slice(128, 256)}


def in_one_document(case: str) -> dict[str, np.ndarray]:
    batch, _, length, *_ = CASES[case]
    return draw(case) | {"start": np.zeros((batch, length), np.int32)}


def poisoned(case: str, place: slice) -> dict[str, np.ndarray]:
    drawn = draw(case)
    for name in ("q", "k", "v", "dout"):
        drawn[name][:, :, place] = np.nan
    return drawn


@pytest.mark.parametrize("case", [*CASES, *DOCUMENTS])
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
        ("one_and_some-BSHd", {"late": 1}),
        ("one_and_some-BSHd", {"late": -1}),
        ("ends_at_tiles-BSHd", {"late": 1}),
        ("ends_at_tiles-BSHd", {"late": -1}),
        ("ends_beside_tiles-part", {"late": 1}),
        ("ends_beside_tiles-part", {"late": -1}),
        ("many_short-part", {"late": 1}),
        ("many_short-part", {"late": -1}),
        ("first_alone-BHSd", {"late": 1}),
        ("first_alone-BHSd", {"late": -1}),
    ],
)
def test_the_bounds_tell_mistakes_apart(
    interpreted: dict[str, np.ndarray], case: str, mistake: dict[str, float]
) -> None:
    found = [torch.from_numpy(interpreted[f"{case}/{name}"]) for name in RESULTS]
    assert wrong(found, exact_case(draw(case), **mistake), 2 * ROUNDING) == set(RESULTS)


@pytest.mark.parametrize("case", ["odd_window-BSHd", "all-BSHd"])
def test_a_sample_that_is_one_document_has_the_same_bits(interpreted: dict[str, np.ndarray], case: str) -> None:
    for name in RESULTS:
        assert np.array_equal(interpreted[f"{case}/{name}"], interpreted[f"{case} in one document/{name}"]), name


@pytest.mark.parametrize(("sick", "healthy"), [("first", "second"), ("second", "first")])
def test_tiles_of_other_documents_are_left_out(interpreted: dict[str, np.ndarray], sick: str, healthy: str) -> None:
    """Of two documents of whole tiles, one is not a number: had a kernel gone through a tile of both, hidden or not,
    the other's results would not be numbers either."""
    for name in RESULTS:
        found, expected = interpreted[f"{sick} not a number/{name}"], interpreted[f"{TWO_OF_WHOLE_TILES}/{name}"]
        assert np.isnan(found[:, :, HALVES[sick]]).all(), name
        assert np.array_equal(found[:, :, HALVES[healthy]], expected[:, :, HALVES[healthy]]), name


@pytest.mark.parametrize("case", DOCUMENTS)
def test_the_last_query_of_each_key(case: str) -> None:
    start_BS = starts_of(DOCUMENTS[case][1])
    sees_BSL = start_BS[:, :, None] <= torch.arange(start_BS.shape[1])
    expected = [[int(row[:, key].nonzero().max()) for key in range(row.shape[1])] for row in sees_BSL]
    found = backward.last_queries(start_BS)
    assert found.dtype == torch.int32
    assert found.tolist() == expected


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
        (
            {"document_start_BS": torch.zeros(1, 3, dtype=torch.int32)},
            r"shape \(1, 4\) and torch.int32, found \(1, 3\)",
        ),
        ({"document_start_BS": torch.zeros(1, 4, dtype=torch.int64)}, "torch.int32, found .* torch.int64: give each"),
        ({"document_start_BS": torch.zeros(1, 4, dtype=torch.int32, device="meta")}, "on cpu, found meta: move them"),
        ({"scale": 0.0}, "scale above 0, found 0.0: set runtime.kernels = 'reference'"),
        ({"scale": -0.1}, "found -0.1"),
        ({"scale": float("nan")}, "found nan"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"q_BHSd": heads(1, 2, 4, 48), "k_BHSd": heads(1, 2, 4, 48), "v_BHSv": heads(1, 2, 4, 32)}
    error = KernelError if "scale" in changes else ShapeError
    with pytest.raises(error, match=message):
        attend(**(given | {"scale": 0.1, "window": 2} | changes))


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0)])
def test_nothing_needs_no_kernel(shape: tuple[int, int, int]) -> None:
    given = [heads(*shape, n).requires_grad_() for n in (48, 48, 32)]
    out = attend(*given, scale=0.1, window=2)
    grads = torch.autograd.grad(out, given, torch.ones_like(out))
    assert [tuple(tensor.shape) for tensor in (out, *grads)] == [(*shape, n) for n in (32, 48, 48, 32)]


def test_shapes_and_strides_are_known_without_data() -> None:
    """As a compiled model asks for them."""
    with FakeTensorMode():
        given = [torch.empty(2, 3, 5, n).bfloat16().requires_grad_() for n in (48, 48, 32)]
        out = attend(*given, scale=0.1, window=2)
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
        return {torch.float32: "*fp32", torch.int32: "*i32"}[argument.dtype]
    if isinstance(argument, (int, float)):
        return {int: "i32", float: "fp32"}[type(argument)]
    assert argument.base.dtype == torch.bfloat16
    return f"tensordesc<bf16{argument.block_shape}>"


COMPILED = [
    (*widths, reach, documents)
    for *widths, reach in tiles.TILES["sm_90a"]
    for documents in (False, True)
    if reach != ("all" if documents else "packed")
]


@pytest.mark.parametrize(("width", "value", "reach", "documents"), COMPILED)
@pytest.mark.parametrize("arch", tiles.TILES)
def test_what_is_compiled_ahead_is_what_is_launched(
    arch: str,
    width: int,
    value: int,
    reach: tiles.Reach,
    documents: bool,
    launches_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And a program for every block of positions of every head."""
    places = ((forward, "_window_attention_kernel"), (backward, "_dq_kernel"), (backward, "_dkdv_kernel"))
    launched = [launches_of(*place) for place in places]
    monkeypatch.setattr(tiles, "_tiles_by_widths", lambda device: tiles.TILES[arch])
    given = [torch.zeros(2, 1100, 3, n).bfloat16().transpose(1, 2).requires_grad_() for n in (width, width, value)]
    window = {"narrow": 128, "wide": 512}.get(reach, 2000)
    start_BS = torch.zeros(2, 1100, dtype=torch.int32) if documents else None
    out = attend(*given, scale=0.1, window=window, document_start_BS=start_BS)
    torch.autograd.grad(out, given, torch.zeros_like(out))
    listed = {kernel.name: kernel for kernel in (*forward.TRITON_KERNELS, *backward.TRITON_KERNELS)}
    table = tiles.TILES[arch][width, value, reach]
    rows = (table.forward.queries, table.dq.queries, table.dkdv.keys)
    assert len(listed) == 3 * len(tiles.TILES) * len(COMPILED)
    for launch, name, owned in zip(launched, ("window_attention", "attention_dq", "attention_dkdv"), rows, strict=True):
        kernel = listed[f"{name}{'_documents' if documents else ''}_{width}_{value}_{reach}_{arch}"]
        assert launch.grid == (2 * 3 * -(-1100 // owned),)
        *args, edge_BS = launch.args
        assert [type_of(argument) for argument in (*args, edge_BS)[: len(kernel.signature)]] == [
            kind for _, kind in kernel.signature
        ]
        edge = {} if documents else {"edge_ptr": edge_BS}
        assert edge | launch.options == dict((*kernel.constants, *kernel.options))
        assert len(launch.args) == len(kernel.signature) + len(edge)


class Called(Exception):
    """A kernel was called."""


@pytest.mark.parametrize(("queries", "expected"), [(8, "kernels"), (3, "reference"), (1, "reference")])
@pytest.mark.parametrize("documents", [False, True])
def test_what_runs_without_a_kernel(
    queries: int, expected: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_BS = torch.zeros(1, queries, dtype=torch.int32) if documents else None

    def called(name: str) -> Any:
        def call(*given: torch.Tensor, scale: float, window: int | None, document_start_BS: Any) -> None:
            assert (scale, window, document_start_BS) == (0.1, 7, start_BS)
            raise Called(name)

        return call

    monkeypatch.setattr(native, "attend", called("kernels"))
    monkeypatch.setattr(native.reference, "attention", called("reference"))
    keys = max(queries, 8) if queries > 1 else 1
    given = (heads(1, 2, queries, 48), heads(1, 2, keys, 48), heads(1, 2, keys, 32))
    with pytest.raises(Called, match=expected):
        native.attention(*given, scale=0.1, window=7, document_start_BS=start_BS)


@pytest.mark.parametrize(
    ("hopper", "widths", "length", "window", "documents", "expected"),
    [
        (True, (64, 64), 8, None, False, ("CUDA", "CUDA")),
        (True, (64, 64), 32_768, None, True, ("CUDA", "CUDA")),
        (True, (128, 128), 8, 7, False, ("CUDA", "CUDA")),
        (True, (192, 128), 4096, None, True, ("CUDA", "CUDA")),
        (True, (48, 80), 4096, None, True, ("CUDA", "CUDA")),
        (True, (192, 128), 32_768, None, False, ("CUDA", "Triton")),
        (True, (192, 128), 32_768, 512, False, ("CUDA", "CUDA")),
        (False, (192, 128), 4096, None, False, ("cuDNN", "Triton")),
        (False, (192, 128), 4096, 4096, False, ("cuDNN", "Triton")),
        (False, (192, 128), 4096, 4095, False, ("Triton", "Triton")),
        (False, (192, 128), 4096, None, True, ("Triton", "Triton")),
    ],
)
def test_which_kernels_run(
    hopper: bool,
    widths: tuple[int, int],
    length: int,
    window: int | None,
    documents: bool,
    expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, of 64 heads on a GPU, which no kernel needs here."""

    def named(name: str) -> Any:
        return lambda *given: name

    monkeypatch.setattr(native, "runs_cuda", lambda device: hopper)
    monkeypatch.setattr(attention_forward_cuda, "forward", named("CUDA"))
    monkeypatch.setattr(attention_backward_cuda, "gradients", named("CUDA"))
    monkeypatch.setattr(attention_cudnn, "forward", named("cuDNN"))
    monkeypatch.setattr(forward, "forward", named("Triton"))
    monkeypatch.setattr(backward, "attention_gradients", named("Triton"))
    with FakeTensorMode():
        q, v = (torch.empty(4, 16, length, n, dtype=torch.bfloat16, device="cuda") for n in widths)
        start_BS = torch.empty(4, length, dtype=torch.int32, device="cuda") if documents else None
        seen = length if window is None else min(window, length)
        assert native._forward(q, q, v, 0.1, seen, start_BS) == expected[0]
        assert native._gradients(v, q, q, v, v, q, 0.1, seen, start_BS) == expected[1]


@pytest.mark.parametrize("length", [1, 127, 129, 700, 4096, 8000, 8448, 16_384])
@pytest.mark.parametrize("window", [1, 100, 129, 1 << 20])
@pytest.mark.parametrize("n_heads", [1, 5, 16, 192])
def test_scores_of_some_heads_at_a_time_find_room(n_heads: int, length: int, window: int) -> None:
    """All heads in as few launches as the workspace allows, none much smaller than another; and two blocks of keys that
    share rows of it take no column twice."""
    cuda = attention_wide_cuda
    rows, columns = cuda.workspace_shape(length, window)
    at_once = cuda.heads_at_once(n_heads, length, window)
    if at_once == 0:
        assert n_heads * rows * columns * 2 > cuda.WORKSPACE_BYTES
        assert length > 8448
        return
    launches = -(-n_heads // at_once)
    assert at_once * rows * columns * 2 <= cuda.WORKSPACE_BYTES
    assert launches == 1 or (-(-n_heads // (launches - 1))) * rows * columns * 2 > cuda.WORKSPACE_BYTES
    assert launches * at_once - n_heads < launches
    blocks = -(-length // cuda.KEYS)
    if window >= length:
        assert rows * columns <= (blocks + 1) * cuda.KEYS * (blocks + 1) // 2 * cuda.KEYS
        assert rows * columns >= sum(range(1, blocks + 1)) * cuda.KEYS**2
    else:
        assert rows * columns >= length * (window + cuda.KEYS - 1)


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
    (2, 3, 1000, 128, 128, 30),
    (2, 4, 1000, 192, 128, 1000),
    (4, 3, 2048, 64, 64, 2048),
    (2, 2, 257, 128, 128, 257),
    (1, 2, 256, 48, 32, 256),
    (3, 5, 1290, 112, 96, 1290),
    (1, 2, 2, 128, 64, 2),
    (1, 2, 1, 64, 64, 1),
    (1, 3, 65, 16, 64, 65),
    (1, 5, 200, 64, 16, 1),
    (3, 25, 130, 64, 64, 77),
    (1, 2, 8700, 64, 64, 8700),
]
"""B, H, S, d, v, window: of some, and none."""


IN_DOCUMENTS_ON_GPU = [
    (2, 3, 300, 64, 64, 100),
    (1, 4, 700, 192, 128, 512),
    (1, 2, 333, 80, 48, 65),
    (2, 2, 1500, 64, 64, 1500),
    (3, 20, 200, 32, 48, 129),
    (2, 2, 1500, 128, 128, 1500),
    (2, 2, 1500, 192, 128, 1500),
    (1, 2, 4096, 192, 128, 4096),
    (1, 2, 4096, 128, 128, 128),
]
"""B, H, S, d, v, window; both reaches of a window, and none, of all widths' tiles."""

PACKINGS: dict[str, list[int]] = {
    "one": [1 << 20],
    "short": [17, 1, 40, 3, 90, 64, 2, 33],
    "at_tiles": [128, 64, 32, 256],
    "beside_tiles": [127, 130, 63, 66],
    "long": [900, 250],
    "last": [],
}
"""Documents' lengths, again and again until the sample ends; `last`: all but the last position, and this alone."""


def packed(packing: str, batch: int, length: int) -> torch.Tensor:
    """Starts; every sample begins with another length of the packing."""
    rows: list[list[int]] = []
    for sample in range(batch):
        lengths = PACKINGS[packing] or [length - 1, 1]
        skipped = sample if packing != "last" else 0
        rows.append([])
        for n in islice(cycle(lengths), skipped, None):
            rows[-1].append(min(n, length - sum(rows[-1])))
            if sum(rows[-1]) == length:
                break
    return starts_of(rows)


def on_gpu(size: tuple[int, ...], gpu: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    batch, n_heads, length, width, value, _ = size
    q, k, v, dout = (
        torch.randn(batch, length, n_heads, n, device=gpu).bfloat16().transpose(1, 2)
        for n in (width, width, value, value)
    )
    return [tensor.requires_grad_() for tensor in (q, k, v)], dout


def results(
    given: list[torch.Tensor], dout: torch.Tensor, window: int, start_BS: torch.Tensor | None = None
) -> list[torch.Tensor]:
    scale = 1.5 * given[0].shape[3] ** -0.5
    out = attend(*given, scale=scale, window=window, document_start_BS=start_BS)
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.fixture(autouse=True, params=["of the device", "of any"])
    def kernels(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """All tests with the kernels that are chosen, and with those that run on every GPU."""
        if request.param == "of any":
            monkeypatch.setattr(native, "runs_cuda", lambda device: False)
        return str(request.param)

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

    @pytest.mark.parametrize("widths", [(64, 64), (192, 128)])
    @pytest.mark.parametrize("length", [128, 256])
    def test_many_short_samples_have_the_same_bits_a_thousand_times(
        self, gpu: str, widths: tuple[int, int], length: int
    ) -> None:
        """A block of threads then has the next tile's memory filled as soon as it has read this one's."""
        given, dout = on_gpu((65_536 // length, 12, length, *widths, 0), gpu)
        found = results(given, dout, length)
        differ = torch.zeros(len(found), dtype=torch.int64, device=gpu)
        for _ in range(1000):
            again = results(given, dout, length)
            differ += torch.stack([(a != b).any() for a, b in zip(again, found, strict=True)])
        assert differ.tolist() == [0] * len(found)

    def test_heads_lie_beside_each_other(self, gpu: str) -> None:
        for tensor in results(*on_gpu((2, 4, 300, 192, 128, 0), gpu), 300):
            assert tensor.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("window", [100, 1500])
    def test_how_many_heads_at_a_time_changes_no_bit(
        self, gpu: str, window: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor does what the workspace held before."""
        given, dout = on_gpu((3, 5, 1500, 192, 128, 0), gpu)
        start_BS = packed("beside_tiles", 3, 1500).to(gpu)
        for starts in (None, start_BS):
            expected = results(given, dout, window, starts)
            for room in (1 << 23, 1 << 25):
                monkeypatch.setattr(attention_wide_cuda, "WORKSPACE_BYTES", room)
                monkeypatch.setattr(attention_wide_cuda, "_LEAST_BLOCKS", 0)
                sick = torch.full((1 << 28,), float("nan"), dtype=torch.bfloat16, device=gpu)
                del sick
                found = results(given, dout, window, starts)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

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

    @pytest.mark.parametrize("packing", PACKINGS)
    @pytest.mark.parametrize("size", IN_DOCUMENTS_ON_GPU)
    def test_documents_equal_float64(self, gpu: str, size: tuple[int, ...], packing: str) -> None:
        """And the same bits again."""
        given, dout = on_gpu(size, gpu)
        start_BS = packed(packing, size[0], size[2]).to(gpu)
        found = results(given, dout, size[-1], start_BS)
        assert wrong(found, exact(*given, dout, 1.5 * size[3] ** -0.5, size[-1], start_BS), ROUNDING) == set()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(found, results(given, dout, size[-1], start_BS), strict=True))

    @pytest.mark.parametrize("late", [-1, 1])
    def test_documents_that_start_elsewhere_are_told_apart(self, gpu: str, late: int) -> None:
        size = (2, 2, 1500, 192, 128, 1500)
        given, dout = on_gpu(size, gpu)
        start_BS = packed("short", 2, 1500).to(gpu)
        moved_BS = (start_BS + late).clamp(min=0).minimum(torch.arange(1500, device=gpu))
        expected = exact(*given, dout, 1.5 * 192**-0.5, 1500, start_BS)
        assert wrong(results(given, dout, 1500, moved_BS.int()), expected, ROUNDING) == set(RESULTS)

    @pytest.mark.parametrize("window", [None, 100])
    def test_documents_in_the_native_tier(self, gpu: str, window: int | None) -> None:
        """Starts that are a part of a longer row, as those of MTP are."""
        given, dout = on_gpu((2, 2, 777, 192, 128, 0), gpu)
        start_BS = packed("short", 2, 800).to(gpu)[:, :777]
        assert not start_BS.is_contiguous()
        scale = 1.5 * 192**-0.5
        out = native.attention(*given, scale=scale, window=window, document_start_BS=start_BS)
        found = [out.detach(), *torch.autograd.grad(out, given, dout)]
        assert wrong(found, exact(*given, dout, scale, window or 777, start_BS), ROUNDING) == set()

    def test_tiles_of_other_documents_are_left_out(self, gpu: str) -> None:
        """See the test of that name above; 128 positions are whole tiles of every kernel."""
        given, dout = on_gpu((2, 2, 1024, 192, 128, 0), gpu)
        start_BS = starts_of([[512, 512]] * 2).to(gpu)
        expected = results(given, dout, 1024, start_BS)
        for poisoned, other in ((slice(0, 512), slice(512, 1024)), (slice(512, 1024), slice(0, 512))):
            sick = [tensor.detach().clone() for tensor in (*given, dout)]
            for tensor in sick:
                tensor[:, :, poisoned] = float("nan")
            found = results([tensor.requires_grad_() for tensor in sick[:3]], sick[3], 1024, start_BS)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a[:, :, other], b[:, :, other])

    def test_a_captured_graph_reads_new_documents(self, gpu: str, capture: Any) -> None:
        given, dout = on_gpu((2, 4, 1300, 192, 128, 0), gpu)
        first, second = (packed(packing, 2, 1300).to(gpu) for packing in ("short", "last"))
        expected = [results(given, dout, 1300, start_BS) for start_BS in (first, second)]
        static = first.clone()
        graph, found = capture(lambda: results(given, dout, 1300, static))
        for start_BS, wanted in zip((first, second), expected, strict=True):
            static.copy_(start_BS)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_places_beyond_2_to_31(self, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last positions of tensors whose elements no int32 counts: the bits of a batch of these alone."""
        if torch.cuda.mem_get_info()[0] < 60 << 30:
            pytest.skip("needs 60 GiB of free device memory")
        monkeypatch.setattr(attention_wide_cuda, "WORKSPACE_BYTES", 1 << 29)  # a head's scores fit
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
