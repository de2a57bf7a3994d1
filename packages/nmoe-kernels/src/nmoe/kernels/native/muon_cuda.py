"""Muon's passes over memory, one launch each: 14 bytes a parameter before its orthogonalisation, 10 after.

Bit for bit what the reference computes.
"""

import ctypes

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native.streams import DEFINES, Stream, check_alignment, check_streams, check_words, launch_over
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

SOURCES = tuple(
    CudaSource(name, "muon.cu", name, ("sm_90a", "sm_100a"), DEFINES) for name in ("muon_momentum", "muon_apply")
)
"""Every compile of this module."""

_MOMENTUM, _APPLY = (CudaKernel(source) for source in SOURCES)


class _MomentumParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "momentum", "ahead", "grad_scale", "ok")),
        ("n", ctypes.c_uint64),
        ("one_minus_beta", ctypes.c_float),
    )


class _ApplyParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "residual", "update", "ok", "scalars")),
        ("n", ctypes.c_uint64),
    )


def muon_momentum_(
    grad: torch.Tensor, momentum: torch.Tensor, grad_scale: torch.Tensor, ok: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """See `nmoe.kernels.reference.muon.muon_momentum_`; tensors start at multiples of 16 bytes.

    Raises:
        ShapeError: a tensor is not as described.
    """
    streams = Stream("grad", grad, torch.float32), Stream("momentum", momentum, torch.float32)
    check_streams(*streams)
    check_words("grad_scale", grad_scale, torch.float32, 1, grad.device)
    check_words("ok", ok, torch.int32, 1, grad.device)
    check_alignment(*streams)
    ahead = torch.empty_like(grad, dtype=torch.bfloat16)
    params = _MomentumParams(
        grad=grad.data_ptr(),
        momentum=momentum.data_ptr(),
        ahead=ahead.data_ptr(),
        grad_scale=grad_scale.data_ptr(),
        ok=ok.data_ptr(),
        n=grad.numel(),
        one_minus_beta=1 - beta,
    )
    launch_over(grad, _MOMENTUM, params)
    return ahead


def muon_apply_(
    weight: torch.Tensor, residual: torch.Tensor | None, update: torch.Tensor, ok: torch.Tensor, scalars: torch.Tensor
) -> None:
    """See `nmoe.kernels.reference.muon.muon_apply_`: bf16 weights with a residual, bf16 updates; tensors start at
    multiples of 16 bytes.

    Raises:
        ShapeError: a tensor is not as described.
    """
    if residual is None:
        raise ShapeError(
            "expected a residual beside bf16 weights, found none: keep one, or set runtime.kernels = 'reference'"
        )
    streams = (
        Stream("weight", weight, torch.bfloat16),
        Stream("residual", residual, torch.int16),
        Stream("update", update, torch.bfloat16),
    )
    check_streams(*streams)
    check_words("ok", ok, torch.int32, 1, weight.device)
    check_words("scalars", scalars, torch.float32, 2, weight.device)
    check_alignment(*streams)
    params = _ApplyParams(
        weight=weight.data_ptr(),
        residual=residual.data_ptr(),
        update=update.data_ptr(),
        ok=ok.data_ptr(),
        scalars=scalars.data_ptr(),
        n=weight.numel(),
    )
    launch_over(weight, _APPLY, params)
