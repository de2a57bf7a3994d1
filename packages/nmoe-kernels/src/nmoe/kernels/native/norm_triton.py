"""RMSNorm in one pass forward and one backward, with the gain's gradient in fp32.

Statistics are formed in fp32 and formed anew in the backward, which needs the whole row anyway. The gain's gradient is
summed over each program's rows, and then over programs, whose number depends on no GPU: same inputs, same bits.

Shapes: R rows, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_ELEMENTS = 4096
"""That a program holds at a time, unless a row has more."""
_PROGRAMS = 1056
"""Of the backward, at most: eight for each multiprocessor of an H100."""
_MAX_WIDTH = 16_384
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default


@triton.jit(do_not_specialize=["n_rows"])
def _norm_kernel(x_ptr, weight_ptr, out_ptr, x_row, n_rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < n_rows) & (column < width)
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    tl.store(out_ptr + row * width + column, (x * scale * weight).to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _norm_backward_kernel(
    dout_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, x_row, n_rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    column = tl.arange(0, WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < n_rows) & (column < width)
        x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / width + eps)
        normed, gained = x * scale, dout * weight
        mean = tl.sum(gained * normed, 1, keep_dims=True) / width
        tl.store(dx_ptr + row * width + column, ((gained - normed * mean) * scale).to(tl.bfloat16), mask=inside)
        dweight += dout * normed
    total = tl.sum(dweight, 0, keep_dims=True)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + column, total, mask=column < width)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `nmoe.kernels.reference.norm.rms_norm`: bf16; the gain's gradient goes to its `main_grad`, if any, in fp32.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together, or a width above 16,384.
    """
    fits = (
        x.dtype == weight.dtype == torch.bfloat16
        and x.dim() >= 1
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and x.device == weight.device
        and 1 <= x.shape[-1] <= _MAX_WIDTH
    )
    if not fits:
        raise ShapeError(
            f"expected x (…, D) and weight (D), torch.bfloat16 on one device, with D ≤ {_MAX_WIDTH}; found "
            f"{tuple(x.shape)} of {x.dtype} on {x.device} and {tuple(weight.shape)} of {weight.dtype} on "
            f"{weight.device}: convert them, or set runtime.kernels = 'reference'"
        )
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps  # the very parameter: its main_grad is looked up when the gradient is there
        x_RD, out = _rows(x), x.new_empty(x.shape)
        n_rows, width = x_RD.shape
        if out.numel():
            sizes = _sizes(width)
            grid = (triton.cdiv(n_rows, sizes["ROWS"]),)
            with torch.cuda.device_of(x):
                _norm_kernel[grid](x_RD, weight, out, x_RD.stride(0), n_rows, width, eps, **sizes, **_OPTIONS)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        x_RD, dout, dx = _rows(x), grads[0].contiguous(), x.new_empty(x.shape)
        n_rows, width = x_RD.shape
        sizes = _sizes(width)
        programs = min(_PROGRAMS, triton.cdiv(n_rows, sizes["ROWS"]))
        dweight_PD = x.new_empty(programs, width, dtype=torch.float32)
        if programs:
            arguments = (dout, x_RD, weight, dx, dweight_PD, x_RD.stride(0), n_rows, width, ctx.eps)
            with torch.cuda.device_of(x):
                _norm_backward_kernel[(programs,)](*arguments, **sizes, **_OPTIONS)
        return dx, deliver(weight, dweight_PD.sum(0)) if ctx.needs_input_grad[1] else None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(R, D) with dense rows: a view where strides allow it, as they do for some columns of a projection."""
    x_RD = x.reshape(-1, x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _sizes(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, _ELEMENTS // padded), "WIDTH": padded}


def _ahead(name: str, function: str, pointers: dict[str, str], width: int) -> TritonKernel:
    types = pointers | {"x_row": "i32", "n_rows": "i32", "width": "i32", "eps": "fp32"}
    return TritonKernel(
        f"{name}_{width}",
        __name__,
        function,
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=tuple(_sizes(width).items()),
        aligned=(*pointers, "x_row", "width"),
        options=tuple(_OPTIONS.items()),
    )


_POINTERS = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16"}
_BACKWARD_POINTERS = {
    "dout_ptr": "*bf16",
    "x_ptr": "*bf16",
    "weight_ptr": "*bf16",
    "dx_ptr": "*bf16",
    "dweight_ptr": "*fp32",
}

TRITON_KERNELS = tuple(
    kernel
    for width in (64, 128, 512, 1024, 2048)
    for kernel in (
        _ahead("rms_norm", "_norm_kernel", _POINTERS, width),
        _ahead("rms_norm_backward", "_norm_backward_kernel", _BACKWARD_POINTERS, width),
    )
)
"""What is compiled ahead: for widths up to these powers of two, multiples of 16."""
