"""AdamW in one pass over memory: 28 bytes a parameter. Bit for bit what the reference computes."""

import ctypes

import torch
from nmoe.kernels.native.streams import DEFINES, Stream, check_alignment, check_streams, check_words, launch_over
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_SPLIT, _PLAIN = (
    CudaSource(name, "adamw.cu", "adamw", ("sm_90a", "sm_100a"), (("SPLIT", split), *DEFINES))
    for name, split in (("adamw_split", 1), ("adamw_plain", 0))
)
SOURCES = (_SPLIT, _PLAIN)
"""Every compile of this module."""

_SPLIT_KERNEL, _PLAIN_KERNEL = CudaKernel(_SPLIT), CudaKernel(_PLAIN)


class _AdamwParams(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "residual", "grad", "exp_avg", "exp_avg_sq", "grad_scale", "ok", "scalars")
        ),
        ("n", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("one_minus_beta1", "beta2", "one_minus_beta2", "eps")),
    )


def adamw_(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor,
    ok: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See `nmoe.kernels.reference.adamw.adamw_`; tensors start at multiples of 16 bytes, with fewer than 2^41 elements.

    Raises:
        ShapeError: a tensor is not as described.
    """
    streams = [
        Stream("weight", weight, torch.float32 if residual is None else torch.bfloat16),
        Stream("grad", grad, torch.float32),
        Stream("exp_avg", exp_avg, torch.float32),
        Stream("exp_avg_sq", exp_avg_sq, torch.float32),
    ]
    if residual is not None:
        streams.append(Stream("residual", residual, torch.int16))
    check_streams(*streams)
    check_words("grad_scale", grad_scale, torch.float32, 1, weight.device)
    check_words("ok", ok, torch.int32, 1, weight.device)
    check_words("scalars", scalars, torch.float32, 3, weight.device)
    check_alignment(*streams)
    params = _AdamwParams(
        weight=weight.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        grad=grad.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        grad_scale=grad_scale.data_ptr(),
        ok=ok.data_ptr(),
        scalars=scalars.data_ptr(),
        n=weight.numel(),
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=eps,
    )
    launch_over(weight, _PLAIN_KERNEL if residual is None else _SPLIT_KERNEL, params)
