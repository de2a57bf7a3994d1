"""RMSNorm of the native tier, alone and after a residual's addition: forward by Triton, backward by CUDA.

Each is the faster one there (H200, rows of 512 to 2048): Triton's programs, a few rows each, forward; bulk copies that
keep many rows on their way backward, where a program stays to sum its rows' part of the gain's gradient. Rows that bulk
copies cannot fetch go backward by Triton too.

The backward of addition and norm reads both outputs' gradients and writes one, which is x's and delta's alike. Each
row's statistic is formed in fp32 and kept, and the sum is rounded to bf16 before its norm. The gain's gradient is
summed in fp32, by a number of programs that depends on no GPU: same inputs, same bits.

Shapes: R rows, D width.
"""

from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native import norm_backward_cuda, norm_triton
from torch.autograd.function import once_differentiable

MAX_WIDTH = 16_384
"""Of a row: what a block holds."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `nmoe.kernels.reference.norm.rms_norm`: bf16; the gain's gradient goes to its `main_grad`, if any, in fp32.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together, or a width above 16,384.
    """
    _check(x, weight)
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nmoe.kernels.reference.norm.add_rms_norm`: bf16; the gain's gradient as `rms_norm` has it.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together, or a width above 16,384.
    """
    _check(x, weight)
    if delta is not None and (delta.shape, delta.dtype, delta.device) != (x.shape, x.dtype, x.device):
        raise ShapeError(
            f"expected delta {tuple(x.shape)} of {x.dtype} on {x.device} as x is, found {tuple(delta.shape)} of "
            f"{delta.dtype} on {delta.device}: convert it"
        )
    total, out = _AddRMSNorm.apply(x, delta, weight, eps)
    return total, out


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    fits = (
        x.dtype == weight.dtype == torch.bfloat16
        and x.dim() >= 1
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and x.device == weight.device
        and 1 <= x.shape[-1] <= MAX_WIDTH
    )
    if not fits:
        raise ShapeError(
            f"expected x (…, D) and weight (D), torch.bfloat16 on one device, with D ≤ {MAX_WIDTH}; found "
            f"{tuple(x.shape)} of {x.dtype} on {x.device} and {tuple(weight.shape)} of {weight.dtype} on "
            f"{weight.device}: convert them, or set runtime.kernels = 'reference'"
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = x.new_empty(x.shape)
        scale_R = norm_triton.forward(_rows(x), None, weight, None, out, eps)
        ctx.save_for_backward(x, scale_R)
        ctx.weight = weight  # the very parameter: its main_grad is looked up when the gradient is there
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale_R = ctx.saved_tensors
        dx, dweight = _backward(grads[0], None, x, scale_R, ctx.weight, ctx.needs_input_grad[1])
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = x.new_empty(x.shape)
        if delta is None:
            total, scale_R = x, norm_triton.forward(_rows(x), None, weight, None, out, eps)
        else:
            total = torch.empty_like(out)
            scale_R = norm_triton.forward(_rows(x), delta.contiguous(), weight, total, out, eps)
        ctx.save_for_backward(total, scale_R)
        ctx.set_materialize_grads(False)  # the last sum of a model leads nowhere
        ctx.weight, ctx.has_delta = weight, delta is not None
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dtotal, dout = grads
        dx, dweight = dtotal, None
        if dout is not None:
            total, scale_R = ctx.saved_tensors
            dx, dweight = _backward(dout, dtotal, total, scale_R, ctx.weight, ctx.needs_input_grad[2])
        return dx, dx if ctx.has_delta else None, dweight, None


def _backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    scale_R: torch.Tensor,
    weight: torch.Tensor,
    wants_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the norm's input, the sum's own added, and of the gain unless that has a `main_grad`."""
    x_RD, dx = _rows(x), x.new_empty(x.shape)
    dout = dout.contiguous()  # autograd may hand an expanded one
    dtotal = None if dtotal is None else dtotal.contiguous()
    by = norm_backward_cuda if norm_backward_cuda.takes(dout, dtotal, x_RD, weight) else norm_triton
    return dx, by.backward(dout, dtotal, x_RD, scale_R, weight, dx, wants_dweight)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(R, D) with dense rows: a view where strides allow it, as they do for some columns of a projection."""
    x_RD = x.reshape(-1, x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()
