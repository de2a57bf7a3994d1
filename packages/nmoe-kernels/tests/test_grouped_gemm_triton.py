"""The Triton grouped products: in Triton's interpreter, compiled for Hopper and Blackwell, and on the GPU at hand.

Operands are small integers, so that fp32 (and, for rows of a result, bf16) holds every sum: results are then equal to
float64's, whatever the order of the sum. Random reals are compared on the GPU, with bounds.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError, UnsupportedArchError

pytest.importorskip("triton", reason="Triton is for Linux")

SIZES = {
    "ragged": (5, 0, 1, 40, 18),
    "one_row": (0, 1),
    "all_to_one": (0, 0, 64, 0),
    "one_expert": (37,),
    "no_rows": (0, 0, 0),
    "300_experts": (0, 3, 0, 17, *(0, 1, 0) * 98, 20, 0),
}
"""Rows of each expert; tiles of the interpreter are 16 × 64 (32 × 64 for weight gradients)."""

WIDTHS = {"tails": (70, 100), "whole": (64, 128), "thin": (3, 1), "square": (33, 33)}
"""(N, M)."""

SPARE = 3
"""Rows after the last expert's, all NaN: nothing may come of them."""

GEMM_CASES = [
    "ragged-tails-plain",
    "ragged-tails-plain-gather",
    "ragged-square-transposed",
    "ragged-square-transposed-gather",
    "ragged-whole-plain",
    "ragged-thin-transposed-gather",
    "one_row-tails-transposed",
    "all_to_one-tails-plain-gather",
    "one_expert-square-plain",
    "no_rows-tails-plain",
    "300_experts-thin-plain",
]
WGRAD_CASES = [
    "ragged-tails-add",
    "ragged-tails-set",
    "ragged-square-add-gather_a",
    "ragged-square-set-gather_b",
    "ragged-tails-add-gather_a-gather_b",
    "ragged-whole-set",
    "one_row-thin-add-gather_b",
    "all_to_one-whole-add",
    "one_expert-tails-set-gather_a",
    "no_rows-tails-set",
    "no_rows-thin-add",
    "300_experts-thin-set",
]
GUARD = 12345.0


def integers(rng: np.random.Generator, limit: int, *shape: int) -> np.ndarray:
    return rng.integers(-limit, limit + 1, shape).astype(np.float32)


def offsets_of(sizes: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def spare(rows: np.ndarray) -> np.ndarray:
    return np.concatenate((rows, np.full((SPARE, rows.shape[1]), np.nan, np.float32)))


def scattered(rng: np.random.Generator, rows: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` in other places of a longer array, with NaN between, and the places of the first `kept`.

    One row in four shares the place (and the values) of another, as tokens do that go to several experts.
    """
    places = rng.permutation(2 * len(rows) + 1)[: len(rows)].astype(np.int32)
    table = np.full((2 * len(rows) + 1, rows.shape[1]), np.nan, np.float32)
    table[places] = rows
    for row in range(3, kept, 4):
        places[row] = places[row - 3]
    return table, places


def draw_gemm(sizes: tuple[int, ...], n: int, m: int, *kinds: str) -> dict[str, np.ndarray]:
    """Sums of at most 100 products of at most 2: bf16 holds integers up to 256."""
    rng = np.random.default_rng([*sizes, n, m])
    a, weight = integers(rng, 1, sum(sizes), n), integers(rng, 2, len(sizes), n, m)
    case = {"a": spare(a), "offset": offsets_of(sizes)}
    if "gather" in kinds:
        case["a"], case["row"] = scattered(rng, spare(a), sum(sizes))
    if "transposed" in kinds:
        return case | {"weight_eMN": np.ascontiguousarray(weight.swapaxes(1, 2))}
    return case | {"weight": weight}


def draw_wgrad(sizes: tuple[int, ...], n: int, m: int, *kinds: str) -> dict[str, np.ndarray]:
    """Sums far beyond what bf16 holds, but not fp32. `into` has eighths, and some -0.0, which adding 0 would change."""
    rng = np.random.default_rng([*sizes, n, m])
    a, b = spare(integers(rng, 99, sum(sizes), m)), spare(integers(rng, 99, sum(sizes), n))
    case = {"a": a, "b": b, "offset": offsets_of(sizes), "add": np.array("add" in kinds)}
    for name in ("a", "b"):
        if f"gather_{name}" in kinds:
            case[name], case[f"{name}_row"] = scattered(rng, case[name], sum(sizes))
    into = integers(rng, 99, len(sizes) * m * n + 1) / 8
    into[into == 0] = -0.0
    into[-1] = GUARD
    return case | {"into": into}


def draw(case: str) -> dict[str, np.ndarray]:
    sizes, widths, *kinds = case.split("-")
    if case in GEMM_CASES:
        return draw_gemm(SIZES[sizes], *WIDTHS[widths], *kinds)
    return draw_wgrad(SIZES[sizes], *WIDTHS[widths], *kinds)


def exact_gemm(case: dict[str, np.ndarray]) -> np.ndarray:
    """In float64, of the rows that experts own."""
    a = case["a"].astype(np.float64)
    if "row" in case:
        a = a[case["row"]]
    weight = case["weight"] if "weight" in case else case["weight_eMN"].swapaxes(1, 2)
    ranges = zip(case["offset"], case["offset"][1:], strict=False)
    return np.concatenate([a[start:end] @ weight[expert] for expert, (start, end) in enumerate(ranges)])


def exact_wgrad(case: dict[str, np.ndarray]) -> np.ndarray:
    """In float64, guard included."""
    a, b = (
        (case[name][case[f"{name}_row"]] if f"{name}_row" in case else case[name]).astype(np.float64)
        for name in ("a", "b")
    )
    ranges = zip(case["offset"], case["offset"][1:], strict=False)
    products = np.stack([a[start:end].T @ b[start:end] for start, end in ranges])
    return np.append(products.reshape(-1) + case["into"][:-1] * case["add"], GUARD)


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results by `<case>/<name>`, from one run of the interpreter."""
    cases = (*GEMM_CASES, *WGRAD_CASES)
    return interpret("grouped_gemm_interpreted.py", {case: draw(case) for case in cases})


@pytest.mark.parametrize("case", GEMM_CASES)
def test_interpreted_gemm_equals_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    expected = exact_gemm(draw(case))
    assert np.array_equal(interpreted[f"{case}/out"][: len(expected)], expected)


@pytest.mark.parametrize("case", WGRAD_CASES)
def test_interpreted_wgrad_equals_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    assert np.array_equal(interpreted[f"{case}/into"], exact_wgrad(draw(case)))


@pytest.mark.parametrize("case", [case for case in WGRAD_CASES if "-add" in case])
def test_an_expert_without_rows_keeps_its_bits(interpreted: dict[str, np.ndarray], case: str) -> None:
    before = draw(case)
    sizes = np.diff(before["offset"])
    old, new = (x[:-1].reshape(len(sizes), -1).view(np.int32) for x in (before["into"], interpreted[f"{case}/into"]))
    assert np.array_equal(old[sizes == 0], new[sizes == 0])


@pytest.mark.parametrize("mistake", ["offset shifted", "offset of one expert", "not gathered", "weight not transposed"])
def test_the_gemm_oracle_tells_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    name = "ragged-square-transposed-gather"
    case = draw(name)
    if mistake == "offset shifted":
        case["offset"][1:-1] += 1
    elif mistake == "offset of one expert":
        case["offset"][3] += 1
    elif mistake == "not gathered":
        del case["row"]
        case["a"] = np.nan_to_num(case["a"])
    else:
        case["weight"] = case.pop("weight_eMN")
    expected = exact_gemm(case)
    assert not np.array_equal(interpreted[f"{name}/out"][: len(expected)], expected)


@pytest.mark.parametrize("mistake", ["offset shifted", "not gathered", "overwritten", "rounded to bf16"])
def test_the_wgrad_oracle_tells_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    name = "ragged-square-add-gather_a"
    case = draw(name)
    if mistake == "offset shifted":
        case["offset"][1:-1] += 1
    elif mistake == "not gathered":
        del case["a_row"]
        case["a"] = np.nan_to_num(case["a"])
    elif mistake == "overwritten":
        case["add"] = np.array(False)
    expected = exact_wgrad(case)
    if mistake == "rounded to bf16":
        expected = torch.from_numpy(expected).bfloat16().double().numpy()
    assert not np.array_equal(interpreted[f"{name}/into"], expected)


def catalog() -> list[Any]:
    from nmoe.kernels.native.grouped_gemm_triton import TRITON_KERNELS

    return list(TRITON_KERNELS)


@pytest.mark.parametrize("kernel", catalog(), ids=lambda kernel: kernel.name)
def test_compiles_without_local_memory(kernel: Any, ahead: Any) -> None:
    """With the tensor cores of the arch, fed by asynchronous copies of 16 bytes, in the arch's shared memory."""
    (arch,) = kernel.arches
    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    assert compiled.resources.shared_bytes <= 227 << 10
    text = ahead.ptx(kernel, compiled)
    assert f".target {arch}" in text
    assert ("wgmma.mma_async" in text) == (arch == "sm_90a")
    assert ("tcgen05.mma" in text) == (arch == "sm_100a")
    assert "mma.sync" not in text
    assert text.count("cp.async.cg.shared.global") >= 24, "both operands, four steps ahead"


TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_what_is_compiled_ahead_is_what_is_launched(arch: str, launches_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch of an expert layer's four products is one of the catalog's, and each of those has a launch."""
    from nmoe.kernels.native import grouped_gemm_triton as module

    launched = set()
    monkeypatch.setattr(module, "_tiles", lambda device: module._TILES[arch])

    def note(name: str, call: Any) -> None:
        launches = launches_of(module, name)
        call()
        types = tuple(TYPES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for x in launches.args)
        launched.add((name, types, frozenset(launches.options.items())))

    a, weight = torch.zeros(96, 64).bfloat16(), torch.zeros(3, 64, 32).bfloat16()
    b, into = torch.zeros(96, 32).bfloat16(), torch.zeros(3, 64, 32)
    offset, row = torch.zeros(4, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    for w in (weight, weight.mT.contiguous().mT):
        for index in (None, row):
            note("_gemm_kernel", lambda w=w, index=index: module.grouped_gemm(a, w, offset, row_R=index))
    for add in (False, True):
        for rows in ({}, {"a_row_R": row}, {"b_row_R": row}):
            note("_wgrad_kernel", lambda add=add, rows=rows: module.grouped_wgrad(a, b, offset, into, add=add, **rows))
    listed = {
        (k.function, tuple(kind for _, kind in k.signature), frozenset((*k.constants, *k.options)))
        for k in catalog()
        if k.arches == (arch,)
    }
    assert launched == listed


A, B = torch.zeros(6, 4).bfloat16(), torch.zeros(6, 8).bfloat16()
WEIGHT, INTO = torch.zeros(2, 4, 8).bfloat16(), torch.zeros(2, 4, 8)
OFFSET, ROW = torch.tensor([0, 2, 6], dtype=torch.int32), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a_RN": A.float()}, "expected a of 2 dimensions and torch.bfloat16; found"),
        ({"a_RN": A[0]}, "expected a of 2 dimensions"),
        ({"a_RN": A[:, :3].contiguous()}, r"expected a \(R, 4\)"),
        ({"a_RN": B[:, ::2]}, r"expected a to be contiguous; found strides \(8, 2\)"),
        ({"a_RN": A.to("meta")}, "expected all tensors on one device; found cpu, meta"),
        ({"weight_eNM": WEIGHT.to("meta")}, "expected all tensors on one device; found cpu, meta"),
        ({"weight_eNM": WEIGHT[:, :, ::2]}, "expected weight, or its transposed view, to be contiguous"),
        ({"weight_eNM": WEIGHT.double()}, "expected weight of 3 dimensions and torch.bfloat16"),
        ({"offset_E": OFFSET.long()}, r"expected offset int32 \(3,\); found \(3,\) of torch.int64"),
        ({"offset_E": OFFSET[:-1]}, r"expected offset int32 \(3,\); found \(2,\)"),
        ({"row_R": ROW.long()}, r"expected row int32 \(5,\)"),
        ({"row_R": ROW[::2]}, "expected row to be contiguous"),
    ],
)
def test_gemm_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm

    with pytest.raises(ShapeError, match=message):
        grouped_gemm(**({"a_RN": A, "weight_eNM": WEIGHT, "offset_E": OFFSET} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a_RM": A.half()}, "expected a of 2 dimensions and torch.bfloat16"),
        ({"b_RN": B.mT.contiguous().mT}, "expected b to be contiguous"),
        ({"b_RN": B[:5]}, "expected as many rows of a as of b, after gathering; found 6 and 5"),
        ({"a_row_R": ROW}, "expected as many rows of a as of b, after gathering; found 5 and 6"),
        ({"into_eMN": INTO.bfloat16()}, "expected into of 3 dimensions and torch.float32"),
        ({"into_eMN": INTO.mT.contiguous()}, r"expected into \(e, 4, 8\)"),
        ({"into_eMN": INTO.mT.contiguous().mT}, "expected into to be contiguous"),
        ({"into_eMN": INTO.to("meta")}, "expected all tensors on one device"),
        ({"offset_E": OFFSET[None]}, r"expected offset int32 \(3,\)"),
        ({"b_row_R": torch.zeros(6)}, r"expected b_row int32 \(6,\)"),
    ],
)
def test_wgrad_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    from nmoe.kernels.native.grouped_gemm_triton import grouped_wgrad

    with pytest.raises(ShapeError, match=message):
        grouped_wgrad(**({"a_RM": A, "b_RN": B, "offset_E": OFFSET, "into_eMN": INTO, "add": True} | changed))


# On the GPU at hand.

GPU_SIZES = {
    "ragged": (100, 0, 1, 155),
    "around_tiles": (127, 0, 128, 129, 0, 257, 383),
    "all_to_one": (0, 0, 300, 0),
    "256_experts": (*(0, 1, 0, 37) * 63, 500, 0, 0, 3),
}
GPU_WIDTHS = {"tails": (72, 520), "whole": (64, 256), "unaligned": (33, 65), "thin": (8, 16)}
GPU_CASES = [f"{sizes}-{widths}" for sizes in GPU_SIZES for widths in GPU_WIDTHS]


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A GPU that the kernels have tiles for."""
    from nmoe.kernels.native import grouped_gemm_triton as module

    found = torch.device("cuda", torch.cuda.current_device())
    try:
        module._tiles(found)
    except UnsupportedArchError as error:
        pytest.skip(str(error))
    yield found
    torch.cuda.empty_cache()


def call_gemm(case: dict[str, np.ndarray], device: torch.device) -> torch.Tensor:
    from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm

    there = {name: torch.from_numpy(array).to(device) for name, array in case.items()}
    weight = there["weight_eMN"].bfloat16().mT if "weight_eMN" in there else there["weight"].bfloat16()
    # The allocator gives freed memory of the same size again: an element that is not written must not look right.
    rows = len(there.get("row", there["a"]))
    poison = [torch.full((rows, weight.shape[2]), float("nan"), dtype=weight.dtype, device=device) for _ in range(4)]
    del poison
    return grouped_gemm(there["a"].bfloat16(), weight, there["offset"], row_R=there.get("row"))


def call_wgrad(case: dict[str, np.ndarray], device: torch.device) -> torch.Tensor:
    """`into` with its guard."""
    from nmoe.kernels.native.grouped_gemm_triton import grouped_wgrad

    there = {name: torch.from_numpy(array).to(device) for name, array in case.items()}
    a, b = there["a"].bfloat16(), there["b"].bfloat16()
    into = there["into"][:-1].view(len(case["offset"]) - 1, a.shape[1], b.shape[1])
    rows = {"a_row_R": there.get("a_row"), "b_row_R": there.get("b_row")}
    grouped_wgrad(a, b, there["offset"], into, add=bool(case["add"]), **rows)
    return there["into"]


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("kinds", [(), ("gather",), ("transposed",), ("transposed", "gather")])
    @pytest.mark.parametrize("case", GPU_CASES)
    def test_gemm_equals_float64(self, device: torch.device, case: str, kinds: tuple[str, ...]) -> None:
        """Sums of at most 72 products of at most 2 are integers that bf16 holds."""
        sizes, widths = case.split("-")
        drawn = draw_gemm(GPU_SIZES[sizes], *GPU_WIDTHS[widths], *kinds)
        expected = exact_gemm(drawn)
        found = call_gemm(drawn, device)[: len(expected)].double().cpu().numpy()
        assert np.array_equal(found, expected)
        drawn["offset"][1:-1] += (drawn["offset"][1:-1] < len(expected)).astype(np.int32)
        assert not np.array_equal(found, exact_gemm(drawn)), "shifted offsets must show"

    @pytest.mark.parametrize("kinds", [("set",), ("add",), ("add", "gather_a"), ("set", "gather_b")])
    @pytest.mark.parametrize("case", GPU_CASES)
    def test_wgrad_equals_float64(self, device: torch.device, case: str, kinds: tuple[str, ...]) -> None:
        """Sums of at most 500 products of at most 99² stay below 2^23, and, of random signs, far below the 2^21 up to
        which fp32 holds eighths."""
        sizes, widths = case.split("-")
        drawn = draw_wgrad(GPU_SIZES[sizes], *GPU_WIDTHS[widths], *kinds)
        found = call_wgrad(drawn, device).cpu().numpy()
        assert np.array_equal(found, exact_wgrad(drawn))
        empty = np.diff(drawn["offset"]) == 0
        old, new = (x[:-1].reshape(len(empty), -1).view(np.int32)[empty] for x in (drawn["into"], found))
        assert np.array_equal(new, old if "add" in kinds else np.zeros_like(old))
        drawn["offset"][1:-1] += (drawn["offset"][1:-1] < sum(GPU_SIZES[sizes])).astype(np.int32)
        assert not np.array_equal(found, exact_wgrad(drawn)), "shifted offsets must show"

    @pytest.mark.parametrize("transposed", [False, True])
    def test_reals(self, device: torch.device, transposed: bool) -> None:
        """One rounding to bf16 (2^-8 of the value), and 2^-22 of the sum of magnitudes for each of N additions, which
        tensor cores may truncate. Repeats give the same bits."""
        sizes, n, m = (300, 0, 77, 900), 1000, 520
        a = torch.randn(sum(sizes), n, device=device).bfloat16()
        weight = torch.randn(len(sizes), m, n, device=device).bfloat16().mT
        if not transposed:
            weight = weight.contiguous()
        offset = torch.from_numpy(offsets_of(sizes)).to(device)
        from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm

        found = [grouped_gemm(a, weight, offset) for _ in range(5)]
        blocks = [*zip(a.double().split(sizes), weight.double(), strict=True)]
        exact = torch.cat([x @ w for x, w in blocks])
        terms = torch.cat([x.abs() @ w.abs() for x, w in blocks])
        assert ((found[0].double() - exact).abs() <= 2**-8 * exact.abs() + n * 2**-22 * terms).all()
        for again in found[1:]:
            assert torch.equal(found[0].view(torch.int16), again.view(torch.int16))

    @pytest.mark.parametrize("gather", [False, True])
    def test_reals_of_wgrad(self, device: torch.device, gather: bool) -> None:
        """In fp32: 2^-22 of the sum of magnitudes for each addition. Repeats give the same bits."""
        sizes, n, m = (300, 0, 77, 900), 264, 520
        a = torch.randn(sum(sizes), m, device=device).bfloat16()
        b = torch.randn(200 if gather else sum(sizes), n, device=device).bfloat16()
        row = torch.randint(len(b), (sum(sizes),), device=device, dtype=torch.int32) if gather else None
        offset = torch.from_numpy(offsets_of(sizes)).to(device)
        before = torch.randn(len(sizes), m, n, device=device)
        from nmoe.kernels.native.grouped_gemm_triton import grouped_wgrad

        found = []
        for _ in range(5):
            found.append(before.clone())
            grouped_wgrad(a, b, offset, found[-1], add=True, b_row_R=row)
        rows = b.double() if row is None else b.double()[row.long()]
        blocks = [*zip(a.double().split(sizes), rows.split(sizes), strict=True)]
        exact = before.double() + torch.stack([x.T @ y for x, y in blocks])
        terms = before.double().abs() + torch.stack([x.abs().T @ y.abs() for x, y in blocks])
        assert ((found[0].double() - exact).abs() <= 900 * 2**-22 * terms).all()
        for again in found[1:]:
            assert torch.equal(found[0].view(torch.int32), again.view(torch.int32))

    def test_a_captured_graph_reads_new_offsets(self, device: torch.device) -> None:
        """The host knows no offset: one capture serves any split of the rows."""
        from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm, grouped_wgrad

        sizes = ((0, 200, 0, 184), (128, 128, 128, 0), (1, 0, 382, 1))
        cases = [draw_gemm(s, 64, 128) for s in sizes]
        a = torch.from_numpy(cases[0]["a"][: sum(sizes[0])]).to(device).bfloat16()
        weight = torch.from_numpy(cases[0]["weight"]).to(device).bfloat16()
        offset = torch.from_numpy(offsets_of(sizes[0])).to(device)
        into = torch.empty(4, 64, 64, device=device)
        grouped_gemm(a, weight, offset)  # compiles
        grouped_wgrad(a, a, offset, into, add=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = grouped_gemm(a, weight, offset)
            grouped_wgrad(a, a, offset, into, add=False)
        for split in sizes:
            offset.copy_(torch.from_numpy(offsets_of(split)))
            graph.replay()
            blocks = a.double().split(split)
            products = torch.cat([x @ w for x, w in zip(blocks, weight.double(), strict=True)])
            assert torch.equal(out.double(), products)
            assert torch.equal(into.double(), torch.stack([x.T @ x for x in blocks]))

    def test_places_beyond_2_to_31(self, device: torch.device) -> None:
        """Rows, weights and gradients whose elements no int32 counts. Only what is looked at is filled."""
        from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm, grouped_wgrad

        wide, few = 1 << 15, 64
        if torch.cuda.mem_get_info(device)[0] < 40 << 30:
            pytest.skip("needs 40 GiB of free device memory")
        table = torch.empty((1 << 16) + few, wide, dtype=torch.bfloat16, device=device)
        rows = table[-few:].normal_()
        row = torch.arange(len(table) - few, len(table), dtype=torch.int32, device=device)
        offset = torch.tensor([0, 0, 0, few], dtype=torch.int32, device=device)
        narrow = torch.randn(3, wide, few, device=device).bfloat16()
        bound = 2**-8 + wide**0.5 * 2**-22
        found = grouped_gemm(table, narrow, offset, row_R=row).double()
        exact = rows.double() @ narrow[2].double()
        assert (found - exact).norm() < bound * exact.norm()
        del table, narrow, found

        weight = torch.empty(3, wide, wide, dtype=torch.bfloat16, device=device)
        weight[2, :, -few:].normal_()
        for view in (weight, weight.mT):
            if view is not weight:
                weight[2, -few:].normal_()
            x = torch.randn(few, wide, device=device).bfloat16()
            found = grouped_gemm(x, view, offset)[:, -few:].double()
            exact = x.double() @ view[2, :, -few:].double()
            assert (found - exact).norm() < bound * exact.norm()
        del weight, view, found

        into = torch.full((3, wide, wide), float("nan"), device=device)
        x = torch.randn(few, wide, device=device).bfloat16()
        grouped_wgrad(x, x, offset, into, add=False)
        assert not into[:2].any(), "experts without rows are zero"
        exact = x[:, -few:].double().T @ x.double()
        assert (into[2, -few:].double() - exact).norm() < 1e-5 * exact.norm()
