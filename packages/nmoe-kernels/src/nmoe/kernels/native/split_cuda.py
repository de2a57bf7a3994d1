"""An fp32 matrix as two bf16 ones, in one pass over memory.

Shapes: R rows, N columns.
"""

import ctypes

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_SOURCE = CudaSource("split", "split.cu", "split", ("sm_90a", "sm_100a"))
SOURCES = (_SOURCE,)
"""Every compile of this module."""

_KERNEL = CudaKernel(_SOURCE)
_THREADS = 256


class _SplitParams(ctypes.Structure):
    _fields_ = (
        ("wide", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("n_elements", ctypes.c_uint),
        ("n_columns", ctypes.c_uint),
    )


def split(wide_RN: torch.Tensor) -> torch.Tensor:
    """bf16 (R, 2, N) whose two halves sum to `wide` to 2⁻¹⁷: each element rounded, and what the rounding left, rounded.

    Raises:
        ShapeError: not a contiguous fp32 matrix on a CUDA device, or 2^32 elements or more.
    """
    whole = wide_RN.dtype == torch.float32 and wide_RN.dim() == 2 and wide_RN.is_cuda and wide_RN.is_contiguous()
    if not whole or wide_RN.numel() >= 1 << 32:
        raise ShapeError(
            "expected a contiguous fp32 matrix (R, N) on a CUDA device of fewer than 2^32 elements; found "
            f"{tuple(wide_RN.shape)} of {wide_RN.dtype} on {wide_RN.device}: convert or divide it"
        )
    rows, columns = wide_RN.shape
    parts = wide_RN.new_empty(rows, 2, columns, dtype=torch.bfloat16)
    if wide_RN.numel():
        params = _SplitParams(wide_RN.data_ptr(), parts.data_ptr(), wide_RN.numel(), columns)
        with torch.cuda.device(wide_RN.device):
            _KERNEL.launch((-(-wide_RN.numel() // _THREADS), 1, 1), _THREADS, 0, params)
    return parts
