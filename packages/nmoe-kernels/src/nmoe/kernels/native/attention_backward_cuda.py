"""Causal attention's backward in CUDA for Hopper, deterministic to the bit: five products and no sum by more than one
block of threads.

The queries' gradient would be a sum over blocks of keys, in the order in which they come to it. So the scores'
gradients are kept, of some heads at a time: one kernel makes them and the gradients of keys and values, and the next
multiplies them by the keys. That is 4 bytes, written and read, beside over a thousand FLOPs of a pair of query and key.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import ctypes

import torch
from nmoe.kernels.native.attention_backward_triton import last_queries
from nmoe.kernels.native.attention_dkdv_cuda import KEYS, dkdv, workspace_shape
from nmoe.kernels.native.attention_dq_cuda import dq
from nmoe.kernels.native.attention_heads_cuda import ARCHES
from nmoe.kernels.native.attention_tiles_triton import empty_heads, for_tma
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

WORKSPACE_BYTES = 288 << 20
"""At most: half and twice as much were within 3% on an H200, but for fewer than some 200 blocks of keys a launch."""
_LEAST_BLOCKS = 240
"""Of keys, in all heads of a launch: fewer, of very different lengths where there is no window, leave multiprocessors
idle."""
_NARROW = 64
"""Up to this width the product by the keys waits for its reads: 5% faster than the Triton kernels on whole samples, 2%
with a window of 512, slower with one of 128. These go without the memory."""
_DELTA_ROWS = 64
"""Of a block, as attention_delta.cu has them."""

_DELTA = CudaKernel(CudaSource("attention_delta", "attention_delta.cu", "attention_delta", ARCHES))

SOURCES = (_DELTA.source,)
"""Every compile of this module."""


class _DeltaParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "dout", "delta", "counter")),
        *((name, ctypes.c_long * 3) for name in ("out_stride", "dout_stride")),
        *((name, ctypes.c_int) for name in ("heads", "length", "pieces", "n_rows")),
    )


def heads_at_once(n_heads: int, length: int, window: int) -> int:
    """Heads whose scores' gradients are kept at a time, about as many in each launch; 0: too few for these kernels."""
    rows, columns = workspace_shape(length, window)
    most = WORKSPACE_BYTES // (2 * rows * columns)
    if most == 0 or (n_heads > most and most * -(-length // KEYS) < _LEAST_BLOCKS):
        return 0
    return -(-n_heads // -(-n_heads // most))


def takes(q_BHSd: torch.Tensor, v_BHSv: torch.Tensor, window: int) -> bool:
    """Whether `gradients` is for these, of `attention_tiles_triton.check_heads`: one of their widths is above 64, and
    there is room for the scores of enough heads at a time. Without a window, or with one that is near as long, and with
    six heads or more in all, there is up to 8448 positions."""
    batch, heads, length, width = q_BHSd.shape
    return max(width, v_BHSv.shape[3]) > _NARROW and heads_at_once(batch * heads, length, window) > 0


def gradients(
    dout_BHSv: torch.Tensor,
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    out_BHSv: torch.Tensor,
    level_BHS: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `attention_backward_triton.attention_gradients`, of one position or more and what `takes` says."""
    batch, heads, length, _ = q_BHSd.shape
    dq_BHSd, dk_BHSd, dv_BHSv = (empty_heads(tensor, tensor.shape[3]) for tensor in (q_BHSd, k_BHSd, v_BHSv))
    dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv = map(for_tma, (dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv))
    start_BS = last_BS = None
    if document_start_BS is not None:
        start_BS = document_start_BS.contiguous()
        last_BS = last_queries(start_BS)
    n_heads = batch * heads
    at_once = heads_at_once(n_heads, length, window)
    dscore = q_BHSd.new_empty(at_once, *workspace_shape(length, window))
    delta_BHS = torch.empty_like(level_BHS)
    counter = torch.empty(1, dtype=torch.int32, device=q_BHSd.device)
    with torch.cuda.device_of(q_BHSd):
        _delta(out_BHSv, dout_BHSv, delta_BHS, counter)
        for first in range(0, n_heads, at_once):
            some = dscore[: min(at_once, n_heads - first)]
            dkdv(
                *(dout_BHSv, q_BHSd, k_BHSd, v_BHSv, level_BHS, delta_BHS, some, dk_BHSd, dv_BHSv),
                *(scale, window, last_BS, first),
            )
            dq(k_BHSd, some, dq_BHSd, counter, scale, window, start_BS, first)
    return dq_BHSd, dk_BHSd, dv_BHSv


def _delta(out_BHSv: torch.Tensor, dout_BHSv: torch.Tensor, delta_BHS: torch.Tensor, counter: torch.Tensor) -> None:
    n_rows = delta_BHS.numel()
    params = _DeltaParams(
        out=out_BHSv.data_ptr(),
        dout=dout_BHSv.data_ptr(),
        delta=delta_BHS.data_ptr(),
        counter=counter.data_ptr(),
        out_stride=out_BHSv.stride()[:3],
        dout_stride=dout_BHSv.stride()[:3],
        heads=delta_BHS.shape[1],
        length=delta_BHS.shape[2],
        pieces=out_BHSv.shape[3] // 8,
        n_rows=n_rows,
    )
    _DELTA.launch((-(-n_rows // _DELTA_ROWS), 1, 1), 256, 0, params)
