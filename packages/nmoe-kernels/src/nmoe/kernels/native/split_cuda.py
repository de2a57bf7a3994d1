"""An fp32 matrix as two or three bf16 ones, in one pass over memory.

Shapes: R rows, N columns.
"""

import ctypes
from typing import Literal

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_SOURCES = {
    parts: CudaSource(f"split_{parts}", "split.cu", "split", ("sm_90a", "sm_100a"), (("PARTS", parts),))
    for parts in (2, 3)
}
SOURCES = tuple(_SOURCES.values())
"""Every compile of this module."""

_KERNELS = {parts: CudaKernel(source) for parts, source in _SOURCES.items()}
_THREADS = 256


class _SplitParams(ctypes.Structure):
    _fields_ = (
        ("wide", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("n_elements", ctypes.c_uint),
        ("n_columns", ctypes.c_uint),
    )


def split(wide_RN: torch.Tensor, parts: Literal[2, 3]) -> torch.Tensor:
    """bf16 (R, parts, N): each element rounded; what that left, rounded; and of three, what was left again.

    Two parts sum to the element within 2⁻¹⁷ of it. Three sum to it exactly, if it is 0 or 2⁻¹¹⁰ or more in size (below,
    its last bits are smaller than any bf16) and does not round to infinity. Of an infinity the parts after the first
    are NaN, and of NaN all.

    Raises:
        ShapeError: not a contiguous fp32 matrix on a CUDA device, 2^32 elements or more, or another number of parts.
    """
    whole = wide_RN.dtype == torch.float32 and wide_RN.dim() == 2 and wide_RN.is_cuda and wide_RN.is_contiguous()
    if not whole or wide_RN.numel() >= 1 << 32:
        raise ShapeError(
            "expected a contiguous fp32 matrix (R, N) on a CUDA device of fewer than 2^32 elements; found "
            f"{tuple(wide_RN.shape)} of {wide_RN.dtype} on {wide_RN.device}: convert or divide it"
        )
    if parts not in _KERNELS:
        raise ShapeError(f"expected 2 or 3 parts, found {parts}: three hold all of fp32's 24 bits")
    rows, columns = wide_RN.shape
    parts_RPN = wide_RN.new_empty(rows, parts, columns, dtype=torch.bfloat16)
    if wide_RN.numel():
        params = _SplitParams(wide_RN.data_ptr(), parts_RPN.data_ptr(), wide_RN.numel(), columns)
        with torch.cuda.device(wide_RN.device):
            _KERNELS[parts].launch((-(-wide_RN.numel() // _THREADS), 1, 1), _THREADS, 0, params)
    return parts_RPN
