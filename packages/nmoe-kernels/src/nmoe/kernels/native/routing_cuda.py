"""Routing in CUDA: selection with gates, its backward, and the order of the routed rows with the experts' row blocks.

`route` and `index_rows` are those of `nmoe.kernels.reference.routing` in int32. They are deterministic, read nothing
back to the host, and may be captured in a CUDA graph. The tokens are cut into `CHUNKS` equal runs. Selection counts the
rows per expert of each run; the order then takes one launch, or two where it has no counts.

Shapes: T tokens, E experts, K experts per token, R = T·K routed rows, B = CHUNKS.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference import routing as reference
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 256
"""Rows of a schedule's entry, but for the last of an expert."""
SCHEDULE_HEAD = 8
"""Words of a schedule before its first entry: the number of entries, 0, and a counter for each of six products."""
CHUNKS = 128
"""Runs of tokens, and blocks of a launch: nearly one for each SM, and few enough that each block sums all counts."""
MAX_EXPERTS = 4096
MAX_TOP_K = 32
"""A lane of the token's warp for each chosen expert."""

_ARCHES = ("sm_90a", "sm_100a")
_MOST_ENDS = 32  # as routing.cu has it
_TURNS = 8
"""Most rows of a lane that the order's kernel has at a time."""
_ORDER_WARPS = {1024: 32, 2048: 16, MAX_EXPERTS: 8}
"""Of its block, by the most experts: each has a word of shared memory for each expert, which has 227 KiB."""
_BACKWARD_THREADS = 256
_BACKWARD_VALUES = 8192
"""Of the logits' gradient that a block of the backward has in shared memory, 32 KiB; more where 4 tokens have more."""
_DEFINES = (("BLOCK_ROWS", BLOCK_ROWS), ("CHUNKS", CHUNKS), ("SCHEDULE_HEAD", SCHEDULE_HEAD))
_SLOTS = {128: 4, 256: 8, 512: 16, MAX_EXPERTS: 0}
"""Experts per lane of the kernel's quick selection, by the most experts that it serves; 0: it has none."""
_ROUTE_SOURCES = {
    limit: CudaSource(f"route_e{limit}", "routing.cu", "route", _ARCHES, (*_DEFINES, ("SLOTS", slots)))
    for limit, slots in _SLOTS.items()
}
_BACKWARD_SOURCE = CudaSource(
    "route_backward", "route_backward.cu", "route_backward", _ARCHES, (("THREADS", _BACKWARD_THREADS),)
)
_COUNT_SOURCES = {
    slab: CudaSource(
        "count_slab" if slab else "count_rows", "routing.cu", "count_rows", _ARCHES, (*_DEFINES, ("SLAB", slab))
    )
    for slab in (0, 1)
}
_INDEX_SOURCES = {
    limit: CudaSource(
        f"index_rows_e{limit}",
        "index_rows.cu",
        "index_rows",
        _ARCHES,
        (*_DEFINES, ("WARPS", warps), ("TURNS", _TURNS)),
    )
    for limit, warps in _ORDER_WARPS.items()
}
_SLAB_SOURCE = CudaSource("index_slab", "routing.cu", "index_slab", _ARCHES, (*_DEFINES, ("SLAB", 1)))
SOURCES = (
    *_ROUTE_SOURCES.values(),
    _BACKWARD_SOURCE,
    *_COUNT_SOURCES.values(),
    *_INDEX_SOURCES.values(),
    _SLAB_SOURCE,
)
"""Every compile of this module."""

_ROUTE = {limit: CudaKernel(source) for limit, source in _ROUTE_SOURCES.items()}
_BACKWARD = CudaKernel(_BACKWARD_SOURCE)
_COUNT = {slab: CudaKernel(source) for slab, source in _COUNT_SOURCES.items()}
_INDEX = {limit: CudaKernel(source) for limit, source in _INDEX_SOURCES.items()}
_INDEX_SLAB = CudaKernel(_SLAB_SOURCE)


class Routing(NamedTuple):
    """Which experts a token goes to."""

    expert_TK: torch.Tensor
    """int32, in falling order of biased score; ties go to the lower expert id."""
    gate_TK: torch.Tensor
    """fp32 weights: unbiased scores, normalised over the K chosen, times the route scale."""
    histogram_BE: torch.Tensor | None
    """int32: rows per expert of each run of tokens, for `index_rows`; None where groups were asked for."""


class RowIndex(NamedTuple):
    """Routed rows in expert order."""

    order_R: torch.Tensor
    """int32: flat (token, slot) index `t·K + k` of each row; rows stand by expert, then token, then slot."""
    token_R: torch.Tensor
    """int32: the token of each row."""
    row_TK: torch.Tensor
    """int32: the row of each (token, slot); the inverse of `order_R`."""
    offset_E: torch.Tensor
    """int32 (E + 1): expert e owns rows `offset[e]` to `offset[e + 1] - 1`."""
    schedule: torch.Tensor
    """int32 (SCHEDULE_HEAD + 4·`max_row_blocks(R, E)`): the number b of row blocks, counters at 0, then (expert, first
    row, rows, wave) of each block in expert order; the wave is 0 where none was asked for. A block has BLOCK_ROWS rows
    or, at its expert's end, fewer; an expert without rows has none. What stands after block b - 1 is undefined. The
    grouped products count their tiles in it, each from 0 back to 0: an index serves one stream at a time."""


class Waves(NamedTuple):
    """What can be computed, and returned, once some of the rows that other ranks send are there. C waves."""

    schedule: torch.Tensor
    """As the index's, but by wave and expert: a block belongs to the wave that its last row comes with."""
    entry_C: torch.Tensor
    """int32 (C + 1): the first entry of each wave there, and the number of entries."""
    ready_S: torch.Tensor
    """int32: the wave with which the last of a slab row's rows can be computed; of slab rows that are there."""


class _RouteParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "expert", "gate", "score", "histogram")),
        *((name, ctypes.c_int) for name in ("n_tokens", "n_experts", "top_k")),
        ("route_scale", ctypes.c_float),
    )


class _RouteBackwardParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dgate", "expert", "score", "dlogits")),
        *((name, ctypes.c_int) for name in ("n_tokens", "n_experts", "top_k", "tokens")),
        ("route_scale", ctypes.c_float),
    )


class _IndexParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("expert", "histogram", "order", "token", "row", "offset", "schedule")),
        *((name, ctypes.c_int) for name in ("n_tokens", "n_experts", "top_k")),
    )


class _SlabIndexParams(ctypes.Structure):
    _fields_ = (
        *_IndexParams._fields_,
        *((name, ctypes.c_int) for name in ("most_tokens", "capacity", "n_waves", "world")),
        *((name, ctypes.c_void_p) for name in ("end", "by_wave", "entry", "ready", "healthy", "record")),
    )


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    *,
    top_k: int,
    n_groups: int = 1,
    n_limited_groups: int = 1,
    route_scale: float = 1.0,
) -> Routing:
    """`nmoe.kernels.reference.routing.route`, differentiable in the logits. One launch forward, one backward.

    A NaN ranks above all numbers, as in torch.sort, and NaNs among themselves by expert id: experts are always valid
    ids, and the token's gates become NaN. With `n_groups` above 1 the reference does the work.

    Args:
        logits_TE: fp32, contiguous, on a CUDA device; E ≤ MAX_EXPERTS.
        bias_E: fp32, contiguous; takes no gradient.
        top_k: K ≤ MAX_TOP_K; R < 2^30.
        n_groups: groups of E / n_groups neighbouring experts.
        n_limited_groups: groups that a token may use.
        route_scale: factor on the normalised weights.

    Raises:
        ShapeError: a tensor is not as described.
    """
    if n_groups > 1:
        grouped = reference.route(
            logits_TE,
            bias_E,
            top_k=top_k,
            n_groups=n_groups,
            n_limited_groups=n_limited_groups,
            route_scale=route_scale,
        )
        return Routing(grouped.expert_TK.to(torch.int32), grouped.gate_TK, None)
    _check_tensor("logits (T, E)", logits_TE, torch.float32, 2)
    n_tokens, n_experts = logits_TE.shape
    _check_experts(n_experts)
    _check_tensor("bias (E)", bias_E, torch.float32, 1)
    if bias_E.shape[0] != n_experts or bias_E.device != logits_TE.device:
        raise ShapeError(
            f"expected a bias of {n_experts} values on {logits_TE.device}, found {tuple(bias_E.shape)} on "
            f"{bias_E.device}: give logits and bias of the same experts"
        )
    if not 1 <= top_k <= min(n_experts, MAX_TOP_K):
        raise ShapeError(
            f"expected top_k from 1 to {min(n_experts, MAX_TOP_K)} for {n_experts} experts, found {top_k}: "
            "choose fewer experts a token, or the reference tier"
        )
    _check_rows(n_tokens * top_k)
    expert_TK, gate_TK, _, histogram_BE = _route_op(logits_TE, bias_E, top_k, route_scale)
    return Routing(expert_TK, gate_TK, histogram_BE)


def index_rows(expert_TK: torch.Tensor, n_experts: int, histogram_BE: torch.Tensor | None = None) -> RowIndex:
    """`nmoe.kernels.reference.routing.index_rows` in int32, with the experts' row blocks.

    Args:
        expert_TK: int32, contiguous, on a CUDA device; ids from 0 to `n_experts` - 1, which is not checked, for reading
            them would wait for the device. R < 2^30.
        n_experts: E ≤ MAX_EXPERTS.
        histogram_BE: the counts that `route` gave with this very `expert_TK`; None: they are counted, by a launch more.

    Raises:
        ShapeError: a tensor is not as described.
    """
    _check_tensor("experts (T, K)", expert_TK, torch.int32, 2)
    _check_experts(n_experts)
    if expert_TK.shape[1] < 1:
        raise ShapeError("expected one expert a token or more, found none: give experts (T, K) with K ≥ 1")
    _check_rows(expert_TK.shape[0] * expert_TK.shape[1])
    if histogram_BE is not None:
        _check_tensor("histogram (B, E)", histogram_BE, torch.int32, 2)
        if histogram_BE.shape != (CHUNKS, n_experts) or histogram_BE.device != expert_TK.device:
            raise ShapeError(
                f"expected a histogram ({CHUNKS}, {n_experts}) on {expert_TK.device}, found "
                f"{tuple(histogram_BE.shape)} on {histogram_BE.device}: give the one that came with these experts"
            )
    return RowIndex(*_index_rows_op(expert_TK, n_experts, histogram_BE))


def index_slab(
    expert_SK: torch.Tensor,
    end_CW: torch.Tensor,
    n_experts: int,
    capacity: int,
    *,
    healthy: torch.Tensor,
    record: torch.Tensor,
) -> tuple[RowIndex, Waves]:
    """The order of what all ranks send to this one: rows by local expert, then wave, source, token and slot.

    Row s of the slab, s = source·N + ordinal, counts as a token. `row_TK` is -1 where a slab row, or its slot, has no
    row here; `order_R` and `token_R` are undefined from `offset[n_experts]` on. If more than `capacity` rows are needed
    none is ordered, `healthy` becomes 0, and the record tells a fault of code 2 with both numbers.

    Args:
        expert_SK: int32, contiguous; local experts, or -1 for another rank's. S = W·N.
        end_CW: int32, contiguous; how many of each source's N rows come up to the end of each wave.
        n_experts: e of this rank; C·e ≤ MAX_EXPERTS.
        capacity: most rows R.
        healthy: int32 word on the device.
        record: int32 words that the device can write: fault, rank, phase, rows needed, rows there were.

    Raises:
        ShapeError: a tensor is not as described.
    """
    _check_tensor("experts (S, K)", expert_SK, torch.int32, 2)
    _check_tensor("ends (C, W)", end_CW, torch.int32, 2)
    (slab_rows, top_k), (n_waves, world) = expert_SK.shape, end_CW.shape
    if not 1 <= end_CW.numel() <= _MOST_ENDS or slab_rows % world:
        raise ShapeError(
            f"expected as many slab rows of each source, of at most {_MOST_ENDS} waves and sources, found {slab_rows} "
            f"rows of {world} sources in {n_waves} waves: give one count for each wave and source of the slab"
        )
    _check_experts(n_experts * n_waves)
    _check_rows(slab_rows * top_k)
    _check_rows(capacity)
    index = RowIndex(
        expert_SK.new_empty(capacity),
        expert_SK.new_empty(capacity),
        torch.empty_like(expert_SK),
        expert_SK.new_empty(n_experts + 1),
        expert_SK.new_empty(SCHEDULE_HEAD + 4 * max_row_blocks(capacity, n_experts)),
    )
    waves = Waves(torch.empty_like(index.schedule), expert_SK.new_empty(n_waves + 1), expert_SK.new_empty(slab_rows))
    n_pairs = n_experts * n_waves
    counts_BE = expert_SK.new_empty(CHUNKS, n_pairs)
    params = _SlabIndexParams(
        expert_SK.data_ptr(),
        counts_BE.data_ptr(),
        *(tensor.data_ptr() for tensor in index),
        slab_rows,
        n_pairs,
        top_k,
        slab_rows // world,
        capacity,
        n_waves,
        world,
        end_CW.data_ptr(),
        *(tensor.data_ptr() for tensor in waves),
        healthy.data_ptr(),
        record.data_ptr(),
    )
    warps = _warps(n_pairs)
    with torch.cuda.device(expert_SK.device):
        _COUNT[1].launch((CHUNKS, 1, 1), 1024, 4 * n_pairs, params)
        _INDEX_SLAB.launch((CHUNKS, 1, 1), 32 * warps, 4 * (n_pairs * (3 + warps) + 2), params)
    return index, waves


def max_row_blocks(n_rows: int, n_experts: int) -> int:
    """The most row blocks that `n_rows` rows of `n_experts` experts can make.

    Each of the m = min(E, R) experts that have rows has a block, and each further block takes BLOCK_ROWS of the other
    R - m rows: m + ⌊(R - m) / BLOCK_ROWS⌋, which some routing attains.
    """
    with_rows = n_experts if n_experts < n_rows else n_rows
    return with_rows + (n_rows - with_rows) // BLOCK_ROWS


def _check_tensor(what: str, tensor: torch.Tensor, dtype: torch.dtype, dims: int) -> None:
    if tensor.dtype == dtype and tensor.dim() == dims and tensor.is_cuda and tensor.is_contiguous():
        return
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    raise ShapeError(
        f"expected {what}, contiguous {dtype} on a CUDA device; found {tuple(tensor.shape)}, {layout} {tensor.dtype} "
        f"on {tensor.device}: convert it, or set runtime.kernels = 'reference'"
    )


def _check_experts(n_experts: int) -> None:
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ShapeError(f"expected 1 to {MAX_EXPERTS} experts, found {n_experts}: use the reference tier")


def _check_rows(n_rows: int) -> None:
    if n_rows >= 1 << 30:
        raise ShapeError(f"expected fewer than 2^30 routed rows, found {n_rows}: split the tokens")


def _warps(n_experts: int) -> int:
    """Warps of a block: each has E words of shared memory, 160 KiB in all."""
    return min(32, 40960 // n_experts)


def _route_cuda(logits_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, route_scale: float) -> tuple[Any, ...]:
    expert_TK, gate_TK, score_TK, histogram_BE = _route_fake(logits_TE, bias_E, top_k, route_scale)
    n_tokens, n_experts = logits_TE.shape
    if n_tokens == 0:
        return expert_TK, gate_TK, score_TK, histogram_BE.zero_()
    limit = next(limit for limit in _SLOTS if n_experts <= limit)
    warps = min(_warps(n_experts), 16 if _SLOTS[limit] == 16 else 32)  # more registers a thread
    params = _RouteParams(
        logits_TE.data_ptr(),
        bias_E.data_ptr(),
        expert_TK.data_ptr(),
        gate_TK.data_ptr(),
        score_TK.data_ptr(),
        histogram_BE.data_ptr(),
        n_tokens,
        n_experts,
        top_k,
        route_scale,
    )
    with torch.cuda.device(logits_TE.device):
        _ROUTE[limit].launch((CHUNKS, 1, 1), 32 * warps, 4 * n_experts * (1 + warps), params)
    return expert_TK, gate_TK, score_TK, histogram_BE


def _route_fake(logits_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, route_scale: float) -> tuple[Any, ...]:
    n_tokens, n_experts = logits_TE.shape
    return (
        logits_TE.new_empty(n_tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(n_tokens, top_k),
        logits_TE.new_empty(n_tokens, top_k),
        logits_TE.new_empty(CHUNKS, n_experts, dtype=torch.int32),
    )


def _route_backward_cuda(
    dgate_TK: torch.Tensor, expert_TK: torch.Tensor, score_TK: torch.Tensor, n_experts: int, route_scale: float
) -> torch.Tensor:
    dlogits_TE = _route_backward_fake(dgate_TK, expert_TK, score_TK, n_experts, route_scale)
    n_tokens, top_k = expert_TK.shape
    if n_tokens == 0:
        return dlogits_TE
    dgate_TK, tokens = dgate_TK.contiguous(), _backward_tokens(n_experts)  # autograd may hand an expanded one
    params = _RouteBackwardParams(
        dgate_TK.data_ptr(),
        expert_TK.data_ptr(),
        score_TK.data_ptr(),
        dlogits_TE.data_ptr(),
        n_tokens,
        n_experts,
        top_k,
        tokens,
        route_scale,
    )
    with torch.cuda.device(dgate_TK.device):
        _BACKWARD.launch((-(-n_tokens // tokens), 1, 1), _BACKWARD_THREADS, 4 * tokens * n_experts, params)
    return dlogits_TE


def _backward_tokens(n_experts: int) -> int:
    """Of a block: a multiple of 4, so that its gradient starts at a multiple of 16 bytes."""
    return min(32, max(4, _BACKWARD_VALUES // n_experts // 4 * 4))


def _route_backward_fake(
    dgate_TK: torch.Tensor, expert_TK: torch.Tensor, score_TK: torch.Tensor, n_experts: int, route_scale: float
) -> torch.Tensor:
    return score_TK.new_empty(score_TK.shape[0], n_experts)


def _index_rows_cuda(expert_TK: torch.Tensor, n_experts: int, histogram_BE: torch.Tensor | None) -> tuple[Any, ...]:
    order_R, token_R, row_TK, offset_E, schedule = _index_rows_fake(expert_TK, n_experts, histogram_BE)
    n_tokens, top_k = expert_TK.shape
    if n_tokens == 0:
        return order_R, token_R, row_TK, offset_E.zero_(), schedule.zero_()
    counts_BE = expert_TK.new_empty(CHUNKS, n_experts) if histogram_BE is None else histogram_BE
    params = _IndexParams(
        expert_TK.data_ptr(),
        counts_BE.data_ptr(),
        order_R.data_ptr(),
        token_R.data_ptr(),
        row_TK.data_ptr(),
        offset_E.data_ptr(),
        schedule.data_ptr(),
        n_tokens,
        n_experts,
        top_k,
    )
    limit, shared_bytes = _order_room(n_tokens, n_experts, top_k)
    with torch.cuda.device(expert_TK.device):
        if histogram_BE is None:
            _COUNT[0].launch((CHUNKS, 1, 1), 1024, 4 * n_experts, params)
        _INDEX[limit].launch((CHUNKS, 1, 1), 32 * _ORDER_WARPS[limit], shared_bytes, params)
    return order_R, token_R, row_TK, offset_E, schedule


def _order_room(n_tokens: int, n_experts: int, top_k: int) -> tuple[int, int]:
    """The order's kernel, by its most experts, and the shared memory of a block."""
    limit = next(limit for limit in _ORDER_WARPS if n_experts <= limit)
    warps = _ORDER_WARPS[limit]
    rows = min(-(-n_tokens // CHUNKS) * top_k, 32 * warps * _TURNS)  # that a block has at a time
    return limit, 4 * (5 * n_experts + 2 + warps * (n_experts + 1) + 2 * rows)


def _index_rows_fake(expert_TK: torch.Tensor, n_experts: int, histogram_BE: torch.Tensor | None) -> tuple[Any, ...]:
    n_rows = expert_TK.shape[0] * expert_TK.shape[1]
    return (
        expert_TK.new_empty(n_rows),
        expert_TK.new_empty(n_rows),
        torch.empty_like(expert_TK),
        expert_TK.new_empty(n_experts + 1),
        expert_TK.new_empty(SCHEDULE_HEAD + 4 * max_row_blocks(n_rows, n_experts)),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits_TE, _, _, ctx.route_scale = inputs
    expert_TK, _, score_TK, histogram_BE = output
    ctx.n_experts = logits_TE.shape[1]
    ctx.mark_non_differentiable(expert_TK, score_TK, histogram_BE)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(expert_TK, score_TK)


@once_differentiable
def _route_gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    dgate_TK = grads[1]
    if dgate_TK is None:
        return None, None, None, None
    return _route_backward_op(dgate_TK, *ctx.saved_tensors, ctx.n_experts, ctx.route_scale), None, None, None


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_LIBRARY.define("route(Tensor logits, Tensor bias, int top_k, float route_scale) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "route_backward(Tensor dgate, Tensor expert, Tensor score, SymInt n_experts, float route_scale) -> Tensor"
)
_LIBRARY.define(
    "index_rows(Tensor expert, SymInt n_experts, Tensor? histogram) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _name, _cuda, _fake in (
    ("route", _route_cuda, _route_fake),
    ("route_backward", _route_backward_cuda, _route_backward_fake),
    ("index_rows", _index_rows_cuda, _index_rows_fake),
):
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"nmoe::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("nmoe::route", _route_gradient, setup_context=_keep_for_backward, lib=_LIBRARY)
_route_op = torch.ops.nmoe.route.default
_route_backward_op = torch.ops.nmoe.route_backward.default
_index_rows_op = torch.ops.nmoe.index_rows.default
