"""The grouped products of a rank's experts on Hopper, with what is fused to them: launches of `grouped_gemm_sm90.cu`
and, as `plan_wgrad.cu` plans, `grouped_wgrad_sm90.cu`. Nothing is read back to the host; no row is copied or padded.

Callers give contiguous tensors on one device, bf16 but for gates, partial sums and weight gradients, which are fp32,
with D and F multiples of 8 (TMA's strides are multiples of 16 bytes): `nmoe.kernels.native.experts_cuda` checks.

Shapes: T tokens, D model width, F expert width, e experts, K experts per token, R = T·K rows in expert order.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from nmoe.kernels.native.exchange_cuda import BLOCKS_BESIDE, Link, LinkParams
from nmoe.kernels.native.routing_cuda import BLOCK_ROWS, RowIndex, Waves
from nmoe.kernels.native.tiles import CANDIDATES, WIDE, Tile, choose_tile
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap, tensor_map

ARCHES = ("sm_90a",)
"""That these products are written for."""
_THREADS = 384
_SHARED_BYTES = 232_448 - 1024  # a block's most, less what barriers and alignment may take
_STEP_BYTES = 128  # of the reduction, per row and stage
_BARRIER_BYTES = 16  # per stage
_QUEUE_BYTES = 64  # of tile_queue.cuh
_CHUNK_ROWS = 16  # of what a warp writes at a time, 128 bytes each
_STAGING_BYTES = 8 * 2 * _CHUNK_ROWS * 128  # eight warps' two chunks
_PLAN_WARPS = 32  # of a block: an expert each
_STEP_ROWS = 64  # of a weight gradient's stage
_LEAST_CUT = 4096
"""Rows below which an expert's weight gradient is not cut: each piece but the first reads and writes all of it."""
_SHARES = 128
"""Blocks over which the weight gradients' work is thought to be spread: nearly a Hopper's multiprocessors, and the same
for every GPU, so that all sum in one order."""
_STORE, _SWIGLU, _DSWIGLU = range(3)
_NONE, _AWAITED, _ONE_WAVE = range(3)

# Product to GATHER, WEIGHT_MN, EPILOGUE, KEEP_PRE, SCALE, ARRIVAL.
_GEMMS = {
    "up": (1, 0, _SWIGLU, 0, 0, _NONE),
    "up_awaited": (1, 0, _SWIGLU, 0, 0, _AWAITED),
    "up_training": (1, 0, _SWIGLU, 1, 0, _NONE),
    "up_training_awaited": (1, 0, _SWIGLU, 1, 0, _AWAITED),
    "down": (0, 0, _STORE, 0, 1, _NONE),
    "down_wave": (0, 0, _STORE, 0, 1, _ONE_WAVE),
    "dgrad_activation": (1, 1, _DSWIGLU, 0, 1, _NONE),
    "dgrad_input": (0, 1, _STORE, 0, 0, _NONE),
}
# Product to GATHER (0: the first operand, 1: the second), ADD.
_WGRADS = {
    "wgrad_down": (0, 0),
    "wgrad_down_add": (0, 1),
    "wgrad_up": (1, 0),
    "wgrad_up_add": (1, 1),
}


_GEMM_FIELDS = (
    *((name, TensorMap) for name in ("rows", "weight", "out", "out_row", "out_pre", "out_pre_row")),
    *((name, ctypes.c_void_p) for name in ("source", "order", "token", "gate", "schedule", "counter", "partial")),
    *((name, ctypes.c_int) for name in ("reduction", "columns", "n_rows", "n_tiles")),
)


# C++ rounds their sizes up to 64.
class _GemmParams(ctypes.Structure):
    _fields_ = (*_GEMM_FIELDS, ("unused", ctypes.c_byte * 56))


class _AwaitedParams(ctypes.Structure):
    _fields_ = (*_GEMM_FIELDS, ("link", LinkParams), ("n_waves", ctypes.c_int), ("unused", ctypes.c_byte * 4))


class _WaveParams(ctypes.Structure):
    _fields_ = (*_GEMM_FIELDS, ("range", ctypes.c_void_p), ("unused", ctypes.c_byte * 48))


_Params = _GemmParams | _AwaitedParams | _WaveParams


class _WgradParams(ctypes.Structure):
    _fields_ = (
        ("dense", TensorMap),
        ("out", TensorMap),
        *((name, ctypes.c_void_p) for name in ("source", "token", "plan", "counter", "turn", "into")),
        *((name, ctypes.c_int) for name in ("m", "n", "n_tiles_m", "n_tiles_n")),
    )


class _PlanParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offset", "plan", "turn")),
        *((name, ctypes.c_int) for name in ("n_experts", "n_tiles", "n_turns")),
    )


def _stages(tile: Tile) -> int:
    return (_SHARED_BYTES - _STAGING_BYTES) // ((tile.m + tile.n) * _STEP_BYTES + _BARRIER_BYTES)


def _shared_bytes(tile: Tile) -> int:
    stages = _stages(tile) * ((tile.m + tile.n) * _STEP_BYTES + _BARRIER_BYTES)
    return stages + _STAGING_BYTES + _QUEUE_BYTES


def _gemm_source(product: str, tile: Tile) -> CudaSource:
    names = ("GATHER", "WEIGHT_MN", "EPILOGUE", "KEEP_PRE", "SCALE", "ARRIVAL")
    shape = (("TILE_M", tile.m), ("TILE_N", tile.n), ("STAGES", _stages(tile)))
    defines = (*zip(names, _GEMMS[product], strict=True), *shape)
    return CudaSource(f"{product}_{tile.m}x{tile.n}", "grouped_gemm_sm90.cu", "grouped_gemm", ARCHES, defines)


def _wgrad_source(product: str, tile: Tile) -> CudaSource:
    shape = (("TILE_M", tile.m), ("TILE_N", tile.n), ("STAGES", _stages(tile)))
    defines = (*zip(("GATHER", "ADD"), _WGRADS[product], strict=True), *shape)
    return CudaSource(f"{product}_{tile.m}x{tile.n}", "grouped_wgrad_sm90.cu", "grouped_wgrad", ARCHES, defines)


def _candidates(product: str) -> tuple[Tile, ...]:
    for suffix in ("_awaited", "_wave", "_training", "_add"):
        product = product.removesuffix(suffix)
    return CANDIDATES[product]


_SOURCES = {(product, tile): _gemm_source(product, tile) for product in _GEMMS for tile in _candidates(product)} | {
    (product, tile): _wgrad_source(product, tile) for product in _WGRADS for tile in _candidates(product)
}
_PLAN_SOURCE = CudaSource(
    "plan_wgrad",
    "plan_wgrad.cu",
    "plan_wgrad",
    ARCHES,
    (("ROWS", _STEP_ROWS), ("LEAST", _LEAST_CUT), ("SHARES", _SHARES)),
)
SOURCES = (*_SOURCES.values(), _PLAN_SOURCE)
"""Every compile of this module."""

_KERNELS = {key: CudaKernel(source) for key, source in _SOURCES.items()}
_PLAN = CudaKernel(_PLAN_SOURCE)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(schedule: torch.Tensor, product: str) -> dict[str, int]:
    """A schedule, and the product's counter in its head."""
    at = schedule.data_ptr()
    return {"schedule": at, "counter": at + 4 * (2 + tuple(CANDIDATES).index(product))}


def _matrix_map(matrix: torch.Tensor, box_columns: int, box_rows: int) -> TensorMap:
    rows, columns = matrix.shape
    return tensor_map(matrix, (columns, rows), (columns * 2,), (box_columns, box_rows), True)


def _weight_map(weight: torch.Tensor, rows: int, columns: int, box_columns: int, box_rows: int) -> TensorMap:
    n = weight.numel() // (rows * columns)
    strides = (columns * 2, rows * columns * 2)
    return tensor_map(weight, (columns, rows, n), strides, (box_columns, box_rows, 1), True)


def _out_maps(out: torch.Tensor) -> dict[str, TensorMap]:
    return {"out": _matrix_map(out, 64, _CHUNK_ROWS), "out_row": _matrix_map(out, 64, 1)}


def _out_pre_maps(pre_R2F: torch.Tensor) -> dict[str, TensorMap]:
    """Of gate and up apart, so that a box ends where its half does."""
    n_rows, columns = pre_R2F.shape
    dims, strides = (columns // 2, 2, n_rows), (columns, columns * 2)
    whole, row = (tensor_map(pre_R2F, dims, strides, (64, 1, rows), True) for rows in (_CHUNK_ROWS, 1))
    return {"out_pre": whole, "out_pre_row": row}


def _launch_gemm(product: str, tile: Tile, device: torch.device, params: _Params, spare: int = 0) -> None:
    """Persistent: a block a multiprocessor, but for those that are spared."""
    tile_columns = tile.n // 2 if product.startswith("up") else tile.n  # of the output: gate and up make one
    params.n_tiles = BLOCK_ROWS // tile.m * -(-params.columns // tile_columns)
    grid = (_multiprocessors(device) - spare, 1, 1)
    _KERNELS[product, tile].launch(grid, _THREADS, _shared_bytes(tile), params)


def up(
    x_TD: torch.Tensor,
    index: RowIndex,
    w13_e2FD: torch.Tensor,
    *,
    keep_pre: bool,
    arriving: tuple[Link, Waves] | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gathers the rows' tokens, and gives `silu(gate) * up` (R, F) and the pre-activation (R, 2F), which is empty
    unless `keep_pre`.

    Args:
        x_TD: tokens.
        index: of the rows.
        w13_e2FD: the experts' gate and up projections.
        keep_pre: whether a backward follows.
        arriving: the link over which tokens still come, and their waves: each tile waits for its own. After
            `exchange_cuda.await_choices`.
        tile: None: the one that is best for these widths.
    """
    _, _, hidden, width = w13_e2FD.shape
    n_rows = index.token_R.shape[0]
    activation_RF = x_TD.new_empty(n_rows, hidden)
    pre_R2F = x_TD.new_empty(n_rows if keep_pre else 0, 2 * hidden)
    tile = tile or choose_tile("up", width, hidden)
    product = "up_training" if keep_pre else "up"
    fields: dict[str, Any] = dict(
        weight=_weight_map(w13_e2FD, hidden, width, 64, 128),
        source=x_TD.data_ptr(),
        token=index.token_R.data_ptr(),
        **_tiles(index.schedule if arriving is None else arriving[1].schedule, "up"),
        reduction=width,
        columns=hidden,
        n_rows=n_rows,
        **_out_maps(activation_RF),
        **(_out_pre_maps(pre_R2F) if keep_pre else {}),
    )
    if arriving is None:
        _launch_gemm(product, tile, x_TD.device, _GemmParams(**fields))
    else:
        link, waves = arriving
        params = _AwaitedParams(**fields, link=link.params, n_waves=waves.entry_C.shape[0] - 1)
        _launch_gemm(f"{product}_awaited", tile, x_TD.device, params)
    return activation_RF, pre_R2F


def down(
    activation_RF: torch.Tensor,
    index: RowIndex,
    gate_TK: torch.Tensor,
    w2_eDF: torch.Tensor,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The down projection, each row times its gate: (R, D)."""
    _, width, hidden = w2_eDF.shape
    out_RD = activation_RF.new_empty(activation_RF.shape[0], width)
    tile = tile or choose_tile("down", width, hidden)
    fields = _down_fields(activation_RF, index, gate_TK, w2_eDF, out_RD)
    _launch_gemm("down", tile, out_RD.device, _GemmParams(**fields, **_tiles(index.schedule, "down")))
    return out_RD


def down_wave(
    activation_RF: torch.Tensor,
    index: RowIndex,
    gate_TK: torch.Tensor,
    w2_eDF: torch.Tensor,
    out_RD: torch.Tensor,
    *,
    waves: Waves,
    wave: int,
    tile: Tile | None = None,
) -> None:
    """As `down`, of the rows that can be computed once a wave is there, into `out_RD`. All but the first leave some of
    the GPU to what returns."""
    _, width, hidden = w2_eDF.shape
    tile = tile or choose_tile("down", width, hidden)
    fields = _down_fields(activation_RF, index, gate_TK, w2_eDF, out_RD)
    params = _WaveParams(**fields, **_tiles(waves.schedule, "down"), range=waves.entry_C[wave:].data_ptr())
    _launch_gemm("down_wave", tile, out_RD.device, params, spare=BLOCKS_BESIDE if wave else 0)


def _down_fields(
    activation_RF: torch.Tensor, index: RowIndex, gate_TK: torch.Tensor, w2_eDF: torch.Tensor, out_RD: torch.Tensor
) -> dict[str, Any]:
    _, width, hidden = w2_eDF.shape
    return dict(
        rows=_matrix_map(activation_RF, 64, 128),
        weight=_weight_map(w2_eDF, width, hidden, 64, 128),
        order=index.order_R.data_ptr(),
        gate=gate_TK.data_ptr(),
        reduction=hidden,
        columns=width,
        n_rows=out_RD.shape[0],
        **_out_maps(out_RD),
    )


def dgrad_activation(
    dout_TD: torch.Tensor,
    index: RowIndex,
    gate_TK: torch.Tensor,
    w2_eDF: torch.Tensor,
    pre_R2F: torch.Tensor,
    *,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward through gate, down projection and SwiGLU.

    Returns:
        The activation times its gate (R, F), which the down projection's weight gradient needs; the pre-activation's
        gradient (R, 2F); and the rows' parts of their gates' gradients, fp32 (column tiles, R), from ungated rows.
    """
    _, width, hidden = w2_eDF.shape
    n_rows = index.token_R.shape[0]
    tile = tile or choose_tile("dgrad_activation", width, hidden)
    gated_RF = dout_TD.new_empty(n_rows, hidden)
    dpre_R2F = dout_TD.new_empty(n_rows, 2 * hidden)
    partial_NR = gate_TK.new_empty(-(-hidden // tile.n), n_rows)
    params = _GemmParams(
        rows=_matrix_map(pre_R2F, 64, 64),
        weight=_weight_map(w2_eDF, width, hidden, 64, 64),
        source=dout_TD.data_ptr(),
        order=index.order_R.data_ptr(),
        token=index.token_R.data_ptr(),
        gate=gate_TK.data_ptr(),
        **_tiles(index.schedule, "dgrad_activation"),
        partial=partial_NR.data_ptr(),
        reduction=width,
        columns=hidden,
        n_rows=n_rows,
        **_out_maps(gated_RF),
        **_out_pre_maps(dpre_R2F),
    )
    _launch_gemm("dgrad_activation", tile, dout_TD.device, params)
    return gated_RF, dpre_R2F, partial_NR


def dgrad_input(
    dpre_R2F: torch.Tensor, index: RowIndex, w13_e2FD: torch.Tensor, *, tile: Tile | None = None
) -> torch.Tensor:
    """Backward through the up projection: each row's gradient of its token, (R, D)."""
    _, _, hidden, width = w13_e2FD.shape
    tile = tile or choose_tile("dgrad_input", width, hidden)
    out_RD = dpre_R2F.new_empty(dpre_R2F.shape[0], width)
    params = _GemmParams(
        rows=_matrix_map(dpre_R2F, 64, 128),
        weight=_weight_map(w13_e2FD, 2 * hidden, width, 64, 64),
        **_tiles(index.schedule, "dgrad_input"),
        reduction=2 * hidden,
        columns=width,
        n_rows=out_RD.shape[0],
        **_out_maps(out_RD),
    )
    _launch_gemm("dgrad_input", tile, out_RD.device, params)
    return out_RD


def wgrad_down(
    dout_TD: torch.Tensor,
    gated_RF: torch.Tensor,
    index: RowIndex,
    into_eDF: torch.Tensor,
    *,
    add: bool,
    tile: Tile | None = None,
) -> None:
    """`into[e]` (+)= doutᵀ · gated activation over the expert's rows."""
    n_experts, width, hidden = into_eDF.shape
    tile = tile or choose_tile("wgrad_down", width, hidden)
    _wgrad("wgrad_down", gated_RF, dout_TD, index, into_eDF, (width, hidden, n_experts), add, tile)


def wgrad_up(
    dpre_R2F: torch.Tensor,
    x_TD: torch.Tensor,
    index: RowIndex,
    into_e2FD: torch.Tensor,
    *,
    add: bool,
    tile: Tile | None = None,
) -> None:
    """`into[e]` (+)= dpreᵀ · x over the expert's rows."""
    n_experts, _, hidden, width = into_e2FD.shape
    tile = tile or choose_tile("wgrad_up", width, hidden)
    _wgrad("wgrad_up", dpre_R2F, x_TD, index, into_e2FD, (2 * hidden, width, n_experts), add, tile)


def _wgrad(
    product: str,
    dense: torch.Tensor,
    source: torch.Tensor,
    index: RowIndex,
    into: torch.Tensor,
    sizes: tuple[int, int, int],
    add: bool,
    tile: Tile,
) -> None:
    m, n, n_experts = sizes
    n_tiles_m, n_tiles_n = -(-m // tile.m), -(-n // tile.n)
    plan, turn = plan_wgrad(index, n_experts, m, n, n_tiles_m * n_tiles_n)
    params = _WgradParams(
        dense=_matrix_map(dense, 64, _STEP_ROWS),
        out=tensor_map(into, (n, m, n_experts), (n * 4, m * n * 4), (32, _CHUNK_ROWS, 1), True),
        source=source.data_ptr(),
        token=index.token_R.data_ptr(),
        plan=plan.data_ptr(),
        counter=_tiles(index.schedule, product)["counter"],
        turn=turn.data_ptr(),
        into=into.data_ptr(),
        m=m,
        n=n,
        n_tiles_m=n_tiles_m,
        n_tiles_n=n_tiles_n,
    )
    kernel = _KERNELS[f"{product}_add" if add else product, tile]
    kernel.launch((_multiprocessors(into.device), 1, 1), _THREADS, _shared_bytes(tile), params)


def plan_wgrad(index: RowIndex, n_experts: int, m: int, n: int, n_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which the experts' weight gradients are computed, and which of them in pieces of their rows.

    Args:
        index: of the rows.
        n_experts: e.
        m: rows of an expert's gradient; from its size the pieces follow.
        n: columns.
        n_tiles: into which it is cut.

    Returns:
        int32 (1 + entries, 4), as `plan_wgrad.cu` describes it: what stands after the last entry is undefined; and the
        tiles' turns, int32 (e, n_tiles), at 0.
    """
    most_entries = n_experts + index.token_R.shape[0] // _LEAST_CUT
    plan = index.token_R.new_empty(1 + most_entries, 4)
    turn = index.token_R.new_empty(n_experts, n_tiles)
    params = _PlanParams(
        offset=index.offset_E.data_ptr(),
        plan=plan.data_ptr(),
        turn=turn.data_ptr(),
        n_experts=n_experts,
        n_tiles=-(-m * n // (WIDE.m * WIDE.n)),
        n_turns=turn.numel(),
    )
    _PLAN.launch((-(-n_experts // _PLAN_WARPS), 1, 1), 32 * _PLAN_WARPS, 0, params)
    return plan, turn
