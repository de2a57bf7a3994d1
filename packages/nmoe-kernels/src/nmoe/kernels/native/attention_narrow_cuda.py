"""Causal attention's backward on Hopper for heads of up to 64 columns: one kernel for keys and values, one for queries,
each of which makes the scores for itself, seven products in all.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import ctypes
import math

import torch
from nmoe.kernels.native.attention_heads_cuda import (
    ARCHES,
    CHUNK_BYTES,
    CHUNK_ROWS,
    COLUMNS,
    heads_map,
    multiprocessors,
)
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap

WIDEST = COLUMNS
"""Of keys and of values."""
_TILE, _OTHER = 128, 64  # rows that a block owns, and the other side's at a time
_WARPS = 8
_STAGES = 6
_THREADS = 384
_KEYS, _QUERIES = 0, 1


def _source(name: str, own: int) -> CudaSource:
    return CudaSource(name, "attention_narrow_sm90.cu", "attention_narrow", ARCHES, (("OWN", own), ("STAGES", _STAGES)))


_KERNELS = {
    own: CudaKernel(_source(name, own))
    for name, own in (("attention_dkdv_narrow", _KEYS), ("attention_dq_narrow", _QUERIES))
}

SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


class _Params(ctypes.Structure):
    _fields_ = (
        *(
            (name, TensorMap)
            for name in ("own_score", "own_weight", "other_score", "other_weight", "dscore", "dweight")
        ),
        *((name, ctypes.c_void_p) for name in ("level", "delta", "edge", "counter")),
        *((name, ctypes.c_int) for name in ("heads", "length", "window", "n_heads")),
        ("exponent", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_byte * 8),  # C++ rounds the size up to 64
    )


def _shared_bytes(own: int) -> int:
    """Dynamic, of a block: what it owns, the ring with its numbers, what leaves, barriers, the queue, and a spare."""
    sums, numbers = (2, _OTHER * 8) if own == _KEYS else (1, 0)
    rows = 2 * (_TILE + _STAGES * _OTHER) * COLUMNS * 2
    return rows + _WARPS * sums * CHUNK_BYTES + _STAGES * numbers + 8 * (2 + 2 * _STAGES) + 64 + 16


def gradients(
    dout_BHSv: torch.Tensor,
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    level_BHS: torch.Tensor,
    delta_BHS: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    counter: torch.Tensor,
    scale: float,
    window: int,
    edges: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Writes the gradients of queries, keys and values.

    Args:
        dout_BHSv: bf16, of the output, as `attention_tiles_triton.for_tma` gives it, like all bf16 inputs.
        q_BHSd: queries; d up to 64.
        k_BHSd: keys.
        v_BHSv: values; v up to 64.
        level_BHS: fp32, contiguous, that forward gave.
        delta_BHS: fp32, contiguous: the sum of a query's output times its gradient.
        grads: of queries, keys and values: written, as `attention_tiles_triton.empty_heads` makes them.
        counter: one word, 0; and 0 again afterwards.
        scale: of the scores.
        window: how many keys a query sees, itself included; S or more: all up to itself.
        edges: int32 (B, S), contiguous: the first key that a query may see, and the last query that may see a key, were
            there no window; both None: no documents.
    """
    batch, heads, length, _ = q_BHSd.shape
    dq_BHSd, dk_BHSd, dv_BHSv = grads
    tiles = batch * heads * -(-length // _TILE)
    blocks = min(tiles, multiprocessors(q_BHSd.get_device()))
    start_BS, last_BS = edges
    keys, queries = (k_BHSd, v_BHSv), (q_BHSd, dout_BHSv)
    sides = {
        _KEYS: (keys, queries, (dk_BHSd, dv_BHSv), last_BS),
        _QUERIES: (queries, keys, (dq_BHSd, dq_BHSd), start_BS),
    }
    for own, ((own_score, own_weight), (other_score, other_weight), (dscore, dweight), edge_BS) in sides.items():
        params = _Params(
            own_score=heads_map(own_score, _TILE),
            own_weight=heads_map(own_weight, _TILE),
            other_score=heads_map(other_score, _OTHER),
            other_weight=heads_map(other_weight, _OTHER),
            dscore=heads_map(dscore, CHUNK_ROWS),
            dweight=heads_map(dweight, CHUNK_ROWS),
            level=level_BHS.data_ptr(),
            delta=delta_BHS.data_ptr(),
            edge=None if edge_BS is None else edge_BS.data_ptr(),
            counter=counter.data_ptr(),
            heads=heads,
            length=length,
            window=min(window, length),
            n_heads=batch * heads,
            exponent=scale * math.log2(math.e),
            scale=scale,
        )
        _KERNELS[own].launch((blocks, 1, 1), _THREADS, _shared_bytes(own), params)
