"""The gathers by token after the grouped products, in CUDA: a token's rows summed, and the gradients of its gates.

One launch each or both at once; deterministic; bound by memory. The ops take no part in autograd graphs: the experts'
backward is derived by hand and calls them.

Shapes: T tokens, D width, K slots, R = T·K rows, N partial sums per row.
"""

import ctypes
from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_SOURCE = CudaSource("combine", "combine.cu", "combine", ("sm_90a", "sm_100a"))
SOURCES = (_SOURCE,)
"""Every compile of this module."""

_KERNEL = CudaKernel(_SOURCE)
_THREADS = 256
_PIECE = 8
"""bf16 values of the 16 bytes that a thread sums."""


class _CombineParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "row", "out", "partial", "dgate")),
        ("n_pieces", ctypes.c_uint),
        ("row_pieces", ctypes.c_uint),
        ("top_k", ctypes.c_int),
        ("n_partials", ctypes.c_int),
        ("n_rows", ctypes.c_uint),
        ("gate_blocks", ctypes.c_uint),
    )


def combine(y_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """`out[t] = Σ_k y[row[t, k]]`, summed in slot order in fp32 and rounded once.

    Args:
        y_RD: bf16, contiguous, on a CUDA device, at a multiple of 16 bytes; D a multiple of 8.
        row_TK: int32, contiguous; values from 0 to R - 1, which is not checked: to read them would wait for the device.

    Returns:
        (T, D) bf16.

    Raises:
        ShapeError: a tensor is not as described.
    """
    _check_rows(row_TK)
    _check_y(y_RD, row_TK)
    return _combine_op(y_RD, row_TK)


def sum_partials(partial_NR: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """`dgate[t, k] = Σ_n partial[n, row[t, k]]`, summed in the order of n.

    Args:
        partial_NR: fp32, contiguous, on a CUDA device.
        row_TK: as `combine`'s.

    Returns:
        (T, K) fp32.

    Raises:
        ShapeError: a tensor is not as described.
    """
    _check_rows(row_TK)
    _check_partial(partial_NR, row_TK)
    return _sum_partials_op(partial_NR, row_TK)


def combine_backward(
    dx_RD: torch.Tensor, row_TK: torch.Tensor, partial_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`combine(dx_RD, row_TK)` and `sum_partials(partial_NR, row_TK)` in one launch; bitwise what they give alone.

    Raises:
        ShapeError: a tensor is not as they describe.
    """
    _check_rows(row_TK)
    _check_y(dx_RD, row_TK)
    _check_partial(partial_NR, row_TK)
    return _combine_backward_op(dx_RD, row_TK, partial_NR)


def _check_rows(row_TK: torch.Tensor) -> None:
    if row_TK.dtype != torch.int32 or row_TK.dim() != 2 or not row_TK.is_cuda or not row_TK.is_contiguous():
        raise _not_as_expected("rows (T, K), contiguous torch.int32", row_TK)
    if row_TK.shape[1] < 1 or row_TK.numel() >= 1 << 31:
        raise ShapeError(
            f"expected rows (T, K) with K ≥ 1 and T·K < 2^31, found {tuple(row_TK.shape)}: split the tokens, or "
            "give each one row or more"
        )


def _check_y(y_RD: torch.Tensor, row_TK: torch.Tensor) -> None:
    if y_RD.dtype != torch.bfloat16 or y_RD.dim() != 2 or not y_RD.is_cuda or not y_RD.is_contiguous():
        raise _not_as_expected("rows (R, D), contiguous torch.bfloat16", y_RD)
    n_rows, width = y_RD.shape
    if width < 1 or width % _PIECE:
        raise ShapeError(f"expected a width of a multiple of {_PIECE}, found {width}: pad the model's width")
    _check_count(n_rows, y_RD, row_TK)
    if row_TK.shape[0] * (width // _PIECE) >= 1 << 31:
        raise ShapeError(
            f"expected T·D < 2^34, found T = {row_TK.shape[0]} and D = {width}: split the tokens into smaller batches"
        )


def _check_partial(partial_NR: torch.Tensor, row_TK: torch.Tensor) -> None:
    if (
        partial_NR.dtype != torch.float32
        or partial_NR.dim() != 2
        or not partial_NR.is_cuda
        or not partial_NR.is_contiguous()
    ):
        raise _not_as_expected("partial sums (N, R), contiguous torch.float32", partial_NR)
    _check_count(partial_NR.shape[1], partial_NR, row_TK)


def _check_count(n_rows: int, tensor: torch.Tensor, row_TK: torch.Tensor) -> None:
    if n_rows != row_TK.numel() or tensor.device != row_TK.device:
        raise ShapeError(
            f"expected R = {row_TK.numel()} rows on {row_TK.device} for row_TK {tuple(row_TK.shape)}, found {n_rows} "
            f"on {tensor.device}: give the rows that row_TK indexes"
        )


def _not_as_expected(expected: str, found: torch.Tensor) -> ShapeError:
    layout = "contiguous" if found.is_contiguous() else "strided"
    return ShapeError(
        f"expected {expected} on a CUDA device; found {tuple(found.shape)}, {layout} {found.dtype} on {found.device}: "
        "convert it, or set runtime.kernels = 'reference'"
    )


def _launch(
    row_TK: torch.Tensor,
    y_RD: torch.Tensor | None = None,
    out_TD: torch.Tensor | None = None,
    partial_NR: torch.Tensor | None = None,
    dgate_TK: torch.Tensor | None = None,
) -> None:
    params = _CombineParams(row=row_TK.data_ptr(), top_k=row_TK.shape[1], n_rows=row_TK.numel(), row_pieces=1)
    blocks = 0
    if partial_NR is not None and dgate_TK is not None:
        params.partial, params.dgate, params.n_partials = partial_NR.data_ptr(), dgate_TK.data_ptr(), len(partial_NR)
        params.gate_blocks = blocks = -(-row_TK.numel() // _THREADS)
    if y_RD is not None and out_TD is not None:
        if y_RD.data_ptr() % 16:
            raise ShapeError(
                f"expected rows that start at a multiple of 16 bytes, found {y_RD.data_ptr():#x}: copy the view"
            )
        params.y, params.out = y_RD.data_ptr(), out_TD.data_ptr()
        params.row_pieces = y_RD.shape[1] // _PIECE
        params.n_pieces = row_TK.shape[0] * params.row_pieces
        blocks += -(-params.n_pieces // _THREADS)
    if blocks:
        with torch.cuda.device(row_TK.device):
            _KERNEL.launch((blocks, 1, 1), _THREADS, 0, params)


def _combine_fake(y_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    return y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])


def _sum_partials_fake(partial_NR: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    return partial_NR.new_empty(row_TK.shape)


def _combine_backward_fake(
    dx_RD: torch.Tensor, row_TK: torch.Tensor, partial_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _combine_fake(dx_RD, row_TK), _sum_partials_fake(partial_NR, row_TK)


def _combine_cuda(y_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    out_TD = _combine_fake(y_RD, row_TK)
    _launch(row_TK, y_RD=y_RD, out_TD=out_TD)
    return out_TD


def _sum_partials_cuda(partial_NR: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    dgate_TK = _sum_partials_fake(partial_NR, row_TK)
    _launch(row_TK, partial_NR=partial_NR, dgate_TK=dgate_TK)
    return dgate_TK


def _combine_backward_cuda(
    dx_RD: torch.Tensor, row_TK: torch.Tensor, partial_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx_TD, dgate_TK = _combine_backward_fake(dx_RD, row_TK, partial_NR)
    _launch(row_TK, dx_RD, dx_TD, partial_NR, dgate_TK)
    return dx_TD, dgate_TK


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_LIBRARY.define("combine(Tensor y, Tensor row) -> Tensor")
_LIBRARY.define("sum_partials(Tensor partial, Tensor row) -> Tensor")
_LIBRARY.define("combine_backward(Tensor dx, Tensor row, Tensor partial) -> (Tensor, Tensor)")
_OPS: tuple[tuple[str, Any, Any], ...] = (
    ("combine", _combine_cuda, _combine_fake),
    ("sum_partials", _sum_partials_cuda, _sum_partials_fake),
    ("combine_backward", _combine_backward_cuda, _combine_backward_fake),
)
for _name, _cuda, _fake in _OPS:
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"nmoe::{_name}", _fake, lib=_LIBRARY)
_combine_op = torch.ops.nmoe.combine.default
_sum_partials_op = torch.ops.nmoe.sum_partials.default
_combine_backward_op = torch.ops.nmoe.combine_backward.default
