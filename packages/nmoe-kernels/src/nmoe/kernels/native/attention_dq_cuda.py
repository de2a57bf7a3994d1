"""The second kernel of causal attention's backward on Hopper: the queries' gradient, a product of the scores' gradients
that `attention_dkdv_cuda` has left with the keys.

Shapes: B batch, H heads, S positions, d columns of queries and keys.
"""

import ctypes

import torch
from nmoe.kernels.native.attention_dkdv_cuda import workspace_map
from nmoe.kernels.native.attention_heads_cuda import ARCHES, CHUNK_BYTES, CHUNK_ROWS, heads_map, multiprocessors
from nmoe.kernels.native.attention_problem_cuda import Gradients, Problem
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap

_THREADS = 384
_QUERIES, _KEYS = 256, 64  # of a tile, and of a stage
_SHARED_BYTES = 232_448 - 1024  # a block's most, less what alignment may take
_STAGING_BYTES = 8 * 2 * CHUNK_BYTES  # eight warps' two chunks
_QUEUE_BYTES = 64  # of tile_queue.cuh
_BARRIER_BYTES = 16  # per stage


def _stages(width: int) -> int:
    return (_SHARED_BYTES - _STAGING_BYTES - _QUEUE_BYTES) // (_stage_bytes(width) + _BARRIER_BYTES)


def _stage_bytes(width: int) -> int:
    return (_QUERIES + width) * _KEYS * 2


def _source(width: int, fold: bool) -> CudaSource:
    defines = (("WIDTH", width), ("FOLD", int(fold)), ("STAGES", _stages(width)))
    name = f"attention_dq_{width}_{'fold' if fold else 'band'}"
    return CudaSource(name, "attention_dq_sm90.cu", "attention_dq", ARCHES, defines)


_WIDTHS = (128, 192)
_KERNELS = {(width, fold): CudaKernel(_source(width, fold)) for width in _WIDTHS for fold in (False, True)}

SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


class _Params(ctypes.Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("dscore", "k", "dq")),
        *((name, ctypes.c_void_p) for name in ("start", "counter")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "length", "window", "first_head", "n_heads")),
        ("unused", ctypes.c_byte * 24),  # C++ rounds the size up to 64
    )


def dq(problem: Problem, grads: Gradients, dscore: torch.Tensor, first_head: int, counter: torch.Tensor) -> None:
    """Writes the queries' gradient of as many heads as the workspace has.

    Args:
        problem: as `attention_dkdv_cuda.dkdv` had it.
        grads: that of queries is written.
        dscore: the workspace, as it left it.
        first_head: of the workspace's.
        counter: one int32, 0; and 0 again afterwards.
    """
    _, heads, length, width = problem.k_BHSd.shape
    n_heads = dscore.shape[0]
    columns = next(most for most in _WIDTHS if width <= most)
    params = _Params(
        dscore=workspace_map(dscore, _KEYS),
        k=heads_map(problem.k_BHSd, _KEYS),
        dq=heads_map(grads.dq_BHSd, CHUNK_ROWS),
        start=None if problem.start_BS is None else problem.start_BS.data_ptr(),
        counter=counter.data_ptr(),
        scale=problem.scale,
        heads=heads,
        length=length,
        window=min(problem.window, length),
        first_head=first_head,
        n_heads=n_heads,
    )
    stages = _stages(columns)
    shared_bytes = stages * (_stage_bytes(columns) + _BARRIER_BYTES) + _STAGING_BYTES + _QUEUE_BYTES
    blocks = min(multiprocessors(problem.k_BHSd.get_device()), n_heads * -(-length // _QUERIES))
    _KERNELS[columns, problem.window >= length].launch((blocks, 1, 1), _THREADS, shared_bytes, params)
