"""Causal attention's backward in CUDA for Hopper, deterministic to the bit: no sum by more than one block of threads.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import ctypes

import torch
from nmoe.kernels.native import attention_narrow_cuda, attention_wide_cuda
from nmoe.kernels.native.attention_backward_triton import last_queries
from nmoe.kernels.native.attention_heads_cuda import ARCHES
from nmoe.kernels.native.attention_problem_cuda import Gradients, Problem
from nmoe.kernels.native.attention_tiles_triton import empty_heads, for_tma
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

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


def takes(q_BHSd: torch.Tensor, v_BHSv: torch.Tensor, window: int) -> bool:
    """Whether `gradients` is for these, of `attention_tiles_triton.check_heads`: they are narrow, or there is room for
    the scores of enough wide heads."""
    batch, heads, length, _ = q_BHSd.shape
    return _narrow(q_BHSd, v_BHSv) or attention_wide_cuda.heads_at_once(batch * heads, length, window) > 0


def _narrow(q_BHSd: torch.Tensor, v_BHSv: torch.Tensor) -> bool:
    return max(q_BHSd.shape[3], v_BHSv.shape[3]) <= attention_narrow_cuda.WIDEST


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
    grads = Gradients(*(empty_heads(tensor, tensor.shape[3]) for tensor in (q_BHSd, k_BHSd, v_BHSv)))
    dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv = map(for_tma, (dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv))
    start_BS = last_BS = None
    if document_start_BS is not None:
        start_BS = document_start_BS.contiguous()
        last_BS = last_queries(start_BS)
    kernels = attention_narrow_cuda if _narrow(q_BHSd, v_BHSv) else attention_wide_cuda
    delta_BHS = torch.empty_like(level_BHS)
    problem = Problem(dout_BHSv, q_BHSd, k_BHSd, v_BHSv, level_BHS, delta_BHS, scale, window, start_BS, last_BS)
    counter = torch.empty(1, dtype=torch.int32, device=q_BHSd.device)
    with torch.cuda.device_of(q_BHSd):
        _delta(out_BHSv, dout_BHSv, delta_BHS, counter)
        kernels.gradients(problem, grads, counter)
    return grads


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
