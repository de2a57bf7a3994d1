"""Causal attention's backward on Hopper for heads of up to 64 columns: one kernel for keys and values, one for queries,
each of which makes the scores for itself, seven products in all.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import ctypes

import torch
from nmoe.kernels.native.attention_heads_cuda import (
    ARCHES,
    CHUNK_BYTES,
    CHUNK_ROWS,
    COLUMNS,
    heads_map,
    multiprocessors,
)
from nmoe.kernels.native.attention_problem_cuda import Gradients, Problem
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


def gradients(problem: Problem, grads: Gradients, counter: torch.Tensor) -> None:
    """Writes the gradients of queries, keys and values.

    Args:
        problem: with d and v of up to 64.
        grads: written.
        counter: one int32, 0; and 0 again afterwards.
    """
    batch, heads, length, _ = problem.q_BHSd.shape
    n_heads = batch * heads
    tiles = n_heads * -(-length // _TILE)
    blocks = min(tiles, multiprocessors(problem.q_BHSd.get_device()))
    keys, queries = (problem.k_BHSd, problem.v_BHSv), (problem.q_BHSd, problem.dout_BHSv)
    sides = {
        _KEYS: (keys, queries, (grads.dk_BHSd, grads.dv_BHSv), problem.last_BS),
        _QUERIES: (queries, keys, (grads.dq_BHSd, grads.dq_BHSd), problem.start_BS),
    }
    for own, ((own_score, own_weight), (other_score, other_weight), (dscore, dweight), edge_BS) in sides.items():
        params = _Params(
            own_score=heads_map(own_score, _TILE),
            own_weight=heads_map(own_weight, _TILE),
            other_score=heads_map(other_score, _OTHER),
            other_weight=heads_map(other_weight, _OTHER),
            dscore=heads_map(dscore, CHUNK_ROWS),
            dweight=heads_map(dweight, CHUNK_ROWS),
            level=problem.level_BHS.data_ptr(),
            delta=problem.delta_BHS.data_ptr(),
            edge=None if edge_BS is None else edge_BS.data_ptr(),
            counter=counter.data_ptr(),
            heads=heads,
            length=length,
            window=min(problem.window, length),
            n_heads=n_heads,
            exponent=problem.exponent,
            scale=problem.scale,
        )
        _KERNELS[own].launch((blocks, 1, 1), _THREADS, _shared_bytes(own), params)
