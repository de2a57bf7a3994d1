"""Grouped bf16 matrix products in Triton, for Hopper and Blackwell; offsets are read on the device.

One program owns a whole output tile and sums it in one order, in fp32: same inputs, same bits. Only plain loads and
`tl.dot` are used, so that Triton's interpreter runs the same source; the compiler turns them into asynchronous copies
and `wgmma` (sm_90a) or `tcgen05` (sm_100a). Any N and M are right; where one is no multiple of 16, rows are not aligned
and the copies are neither asynchronous nor wide.

Shapes: T tokens, R rows sorted by expert, e experts, N and M widths. `offset_E` is int32 (e + 1): expert i owns rows
`offset[i]` to `offset[i + 1] - 1`.
"""

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from nmoe.kernels.arch import entry_for
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel

_MIN_EXPERTS = 256  # a vector of one expert a thread; fewer experts need no other kernel


class Tile(NamedTuple):
    """An output tile of `rows` × `cols`, summed in steps of `inner`; warps of a program, and stages of its pipeline."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of one arch."""

    gemm: Tile
    wgrad: Tile
    wgrad_gather: Tile
    """Rows wait for their indices within the pipeline, so that it takes seven stages to have four steps in flight."""


_TILES = {
    "sm_90a": Tiles(
        gemm=Tile(128, 256, 64, 8, 4), wgrad=Tile(128, 256, 64, 8, 4), wgrad_gather=Tile(128, 256, 64, 8, 7)
    ),
    "sm_100a": Tiles(
        gemm=Tile(128, 256, 64, 8, 4), wgrad=Tile(128, 256, 64, 8, 4), wgrad_gather=Tile(128, 256, 64, 8, 7)
    ),
}
_INTERPRETED = Tiles(gemm=Tile(16, 64, 32, 1, 1), wgrad=Tile(32, 64, 16, 1, 1), wgrad_gather=Tile(32, 64, 16, 1, 1))
"""Small, and different in each direction, so that small tensors have every kind of edge."""


@triton.jit(do_not_specialize=["n_experts"])
def _gemm_kernel(
    a_ptr,
    weight_ptr,
    out_ptr,
    offset_ptr,
    row_ptr,
    n_experts,
    n,
    m,
    EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    at_E = tl.arange(0, EXPERTS)
    start_E = tl.load(offset_ptr + at_E, mask=at_E < n_experts, other=0)
    end_E = tl.load(offset_ptr + at_E + 1, mask=at_E < n_experts, other=0)
    tiles_E = tl.cdiv(end_E - start_E, ROWS)
    last_E = tl.cumsum(tiles_E, 0)
    col_tiles = tl.cdiv(m, COLS)
    n_tiles = tl.sum(tiles_E, 0) * col_tiles

    # Neighbouring programs share rows first, then the expert's weight: both stay in L2.
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row_tile = tile // col_tiles
        expert = tl.sum((last_E <= row_tile).to(tl.int32), 0)
        tiles_before = tl.max(tl.where(last_E <= row_tile, last_E, 0), 0)
        start = tl.load(offset_ptr + expert) + (row_tile - tiles_before) * ROWS
        row_R = start + tl.arange(0, ROWS)
        row_inside = row_R < tl.load(offset_ptr + expert + 1)
        col_M = (tile % col_tiles) * COLS + tl.arange(0, COLS)
        col_inside = col_M < m
        at_N = tl.arange(0, INNER)

        source_R = tl.load(row_ptr + row_R, mask=row_inside, other=0) if GATHER else row_R
        a_at = a_ptr + source_R.to(tl.int64)[:, None] * n + at_N[None, :]
        weight_at = weight_ptr + expert.to(tl.int64) * n * m
        if TRANSPOSED:
            weight_at += col_M.to(tl.int64)[None, :] * n + at_N[:, None]
        else:
            weight_at += at_N[:, None] * m + col_M[None, :]
        total = tl.zeros((ROWS, COLS), tl.float32)
        for done in range(0, n, INNER):
            inside = at_N < n - done
            a = tl.load(a_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_at, mask=inside[:, None] & col_inside[None, :], other=0.0)
            total = tl.dot(a, weight, total)
            a_at += INNER
            weight_at += INNER if TRANSPOSED else INNER * m
        out_at = out_ptr + row_R.to(tl.int64)[:, None] * m + col_M[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


@triton.jit
def _wgrad_kernel(
    a_ptr,
    b_ptr,
    into_ptr,
    offset_ptr,
    a_row_ptr,
    b_row_ptr,
    m,
    n,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    col_tiles = tl.cdiv(n, COLS)
    tiles = tl.cdiv(m, ROWS) * col_tiles
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    start = tl.load(offset_ptr + expert)
    end = tl.load(offset_ptr + expert + 1)
    if ADD and start == end:  # adding zeros would still turn -0.0 into 0.0, and cost a pass over memory
        return
    at_M = (tile // col_tiles) * ROWS + tl.arange(0, ROWS)
    at_N = (tile % col_tiles) * COLS + tl.arange(0, COLS)
    m_inside = at_M < m
    n_inside = at_N < n

    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(start, end, INNER):
        row_R = first + tl.arange(0, INNER)
        inside = row_R < end
        a_R = tl.load(a_row_ptr + row_R, mask=inside, other=0) if GATHER_A else row_R
        b_R = tl.load(b_row_ptr + row_R, mask=inside, other=0) if GATHER_B else row_R
        a_at = a_ptr + a_R.to(tl.int64)[:, None] * m + at_M[None, :]
        b_at = b_ptr + b_R.to(tl.int64)[:, None] * n + at_N[None, :]
        a = tl.load(a_at, mask=inside[:, None] & m_inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)

    corner = (expert.to(tl.int64) * m + (tile // col_tiles) * ROWS) * n + (tile % col_tiles) * COLS
    into_at = into_ptr + corner + tl.arange(0, ROWS)[:, None] * n + tl.arange(0, COLS // 2)[None, :]
    n_left = n - (tile % col_tiles) * COLS
    # In halves: registers do not hold a whole tile and what it is added to.
    left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLS // 2)), (0, 2, 1)))
    _put(into_at, left, m_inside, n_left, ADD)
    _put(into_at + COLS // 2, right, m_inside, n_left - COLS // 2, ADD)


@triton.jit
def _put(into_at, value, m_inside, n_left, ADD: tl.constexpr):
    inside = m_inside[:, None] & (tl.arange(0, value.shape[1]) < n_left)[None, :]
    if ADD:
        value += tl.load(into_at, mask=inside, other=0.0)
    tl.store(into_at, value, mask=inside)


def grouped_gemm(
    a_RN: torch.Tensor,
    weight_eNM: torch.Tensor,
    offset_E: torch.Tensor,
    *,
    row_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row r of expert i times `weight[i]`, summed in fp32 and rounded once: bf16 (R, N) to (R, M).

    Args:
        a_RN: bf16, contiguous; (T, N) where `row_R` is given.
        weight_eNM: bf16 (e, N, M), contiguous or the transposed view of a contiguous (e, M, N).
        offset_E: int32 (e + 1), rising from 0. Rows of the result from `offset[e]` on are left unset.
        row_R: int32 (R): row r is `a[row_R[r]]`. Neither indices nor offsets are checked: that would make the host
            wait.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as above.
        UnsupportedArchError: there are no tiles for the device.
    """
    n_experts, n, m = _sizes("weight", weight_eNM, torch.bfloat16, 3)
    rows, width = _sizes("a", a_RN, torch.bfloat16, 2)
    transposed = not weight_eNM.is_contiguous()
    if width != n:
        raise ShapeError(f"expected a (R, {n}) for weight {tuple(weight_eNM.shape)}; found {tuple(a_RN.shape)}")
    _require_contiguous("a", a_RN)
    _require_contiguous("weight, or its transposed view,", weight_eNM.mT if transposed else weight_eNM)
    _require_index("offset", offset_E, n_experts + 1, a_RN)
    if row_R is not None:
        rows = row_R.numel()
        _require_index("row", row_R, rows, a_RN)
    _require_device(a_RN, weight_eNM)
    tile, programs = _tiles(a_RN.device).gemm, _programs(a_RN.device)

    out_RM = a_RN.new_empty(rows, m)
    # A program for every tile that there may be, if they are few: no more partly filled tiles than experts.
    bound = (triton.cdiv(rows, tile.rows) + min(n_experts, rows)) * triton.cdiv(m, tile.cols)
    if bound == 0:
        return out_RM
    _gemm_kernel[(min(bound, programs),)](
        a_RN,
        weight_eNM,
        out_RM,
        offset_E,
        offset_E if row_R is None else row_R,
        n_experts,
        n,
        m,
        EXPERTS=max(_MIN_EXPERTS, triton.next_power_of_2(n_experts)),
        TRANSPOSED=transposed,
        GATHER=row_R is not None,
        **_options(tile),
    )
    return out_RM


def grouped_wgrad(
    a_RM: torch.Tensor,
    b_RN: torch.Tensor,
    offset_E: torch.Tensor,
    into_eMN: torch.Tensor,
    *,
    add: bool,
    a_row_R: torch.Tensor | None = None,
    b_row_R: torch.Tensor | None = None,
) -> None:
    """`a[rows of i]ᵀ @ b[rows of i]` into `into[i]`, in fp32 throughout.

    Args:
        a_RM: bf16, contiguous; (T, M) where `a_row_R` is given.
        b_RN: bf16, contiguous; (T, N) where `b_row_R` is given.
        offset_E: int32 (e + 1), rising from 0.
        into_eMN: fp32, contiguous.
        add: adds to what is there, and leaves experts without rows as they are; otherwise overwrites, with zeros where
            an expert has no rows.
        a_row_R: int32 (R): row r is `a[a_row_R[r]]`.
        b_row_R: int32 (R): row r is `b[b_row_R[r]]`.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as above.
        UnsupportedArchError: there are no tiles for the device.
    """
    a_rows, m = _sizes("a", a_RM, torch.bfloat16, 2)
    b_rows, n = _sizes("b", b_RN, torch.bfloat16, 2)
    n_experts = _sizes("into", into_eMN, torch.float32, 3)[0]
    if into_eMN.shape[1:] != (m, n):
        raise ShapeError(f"expected into (e, {m}, {n}) for a (·, {m}) and b (·, {n}); found {tuple(into_eMN.shape)}")
    for name, tensor in (("a", a_RM), ("b", b_RN), ("into", into_eMN)):
        _require_contiguous(name, tensor)
    _require_index("offset", offset_E, n_experts + 1, a_RM)
    if a_row_R is not None:
        a_rows = a_row_R.numel()
        _require_index("a_row", a_row_R, a_rows, a_RM)
    if b_row_R is not None:
        b_rows = b_row_R.numel()
        _require_index("b_row", b_row_R, b_rows, a_RM)
    if a_rows != b_rows:
        raise ShapeError(f"expected as many rows of a as of b, after gathering; found {a_rows} and {b_rows}")
    _require_device(a_RM, b_RN, into_eMN)
    tiles = _tiles(a_RM.device)
    tile = tiles.wgrad if a_row_R is None and b_row_R is None else tiles.wgrad_gather

    programs = n_experts * triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.cols)
    if programs == 0:
        return
    # One program a tile, not a persistent grid: the hardware evens out experts of different sizes.
    _wgrad_kernel[(programs,)](
        a_RM,
        b_RN,
        into_eMN,
        offset_E,
        offset_E if a_row_R is None else a_row_R,
        offset_E if b_row_R is None else b_row_R,
        m,
        n,
        GATHER_A=a_row_R is not None,
        GATHER_B=b_row_R is not None,
        ADD=add,
        **_options(tile),
    )


@functools.cache
def _tiles(device: torch.device) -> Tiles:
    return _INTERPRETED if device.type == "cpu" else entry_for(device, _TILES, "the Triton grouped GEMM")


@functools.cache
def _programs(device: torch.device) -> int:
    """One program a multiprocessor; three in the interpreter, so that each takes several tiles."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "INNER": tile.inner,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,  # said, since Triton 3.10 changes the default
    }


def _sizes(name: str, tensor: torch.Tensor, dtype: torch.dtype, rank: int) -> tuple[int, ...]:
    if tensor.dtype != dtype or tensor.dim() != rank:
        raise ShapeError(
            f"expected {name} of {rank} dimensions and {dtype}; found {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tuple(tensor.shape)


def _require_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ShapeError(
            f"expected {name} to be contiguous; found strides {tensor.stride()} for {tuple(tensor.shape)}: "
            "call .contiguous() on it"
        )


def _require_index(name: str, index: torch.Tensor, size: int, beside: torch.Tensor) -> None:
    if index.dtype != torch.int32 or index.shape != (size,):
        raise ShapeError(
            f"expected {name} int32 ({size},); found {tuple(index.shape)} of {index.dtype}: convert it with .int()"
        )
    _require_contiguous(name, index)
    _require_device(beside, index)


def _require_device(*tensors: torch.Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ShapeError(f"expected all tensors on one device; found {', '.join(sorted(devices))}: move them to one")


_GEMM_TYPES = {
    "a_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "out_ptr": "*bf16",
    "offset_ptr": "*i32",
    "row_ptr": "*i32",
    "n_experts": "i32",
    "n": "i32",
    "m": "i32",
}
_WGRAD_TYPES = {
    "a_ptr": "*bf16",
    "b_ptr": "*bf16",
    "into_ptr": "*fp32",
    "offset_ptr": "*i32",
    "a_row_ptr": "*i32",
    "b_row_ptr": "*i32",
    "m": "i32",
    "n": "i32",
}


def _ahead(
    name: str, function: str, arch: str, tile: Tile, types: dict[str, str], constants: dict[str, int]
) -> TritonKernel:
    options = _options(tile)
    sizes = {key: options.pop(key) for key in ("ROWS", "COLS", "INNER")}
    return TritonKernel(
        f"{name}_{arch}",
        __name__,
        function,
        (arch,),
        tuple(types.items()),
        constants=tuple((constants | sizes).items()),
        aligned=tuple(argument for argument in types if argument != "n_experts"),
        options=tuple(options.items()),
    )


TRITON_KERNELS = (
    *(
        _ahead(
            "grouped_gemm" + "_transposed" * transposed + "_gather" * gather,
            "_gemm_kernel",
            arch,
            tiles.gemm,
            _GEMM_TYPES,
            {"EXPERTS": _MIN_EXPERTS, "TRANSPOSED": transposed, "GATHER": gather},
        )
        for arch, tiles in _TILES.items()
        for transposed, gather in itertools.product((False, True), repeat=2)
    ),
    *(
        _ahead(
            "grouped_wgrad" + "_add" * add + gather,
            "_wgrad_kernel",
            arch,
            tiles.wgrad_gather if gather else tiles.wgrad,
            _WGRAD_TYPES,
            {"GATHER_A": gather == "_gather_a", "GATHER_B": gather == "_gather_b", "ADD": add},
        )
        for arch, tiles in _TILES.items()
        for add, gather in itertools.product((False, True), ("", "_gather_a", "_gather_b"))
    ),
)
"""What is compiled ahead: every variant for sizes of multiples of 16 and up to 256 experts, but a gather of both
operands of a weight gradient, which no expert layer needs."""
