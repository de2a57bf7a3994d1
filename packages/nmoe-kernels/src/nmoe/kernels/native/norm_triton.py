"""RMSNorm in one pass forward and one backward, alone and after a residual's addition; the gain's gradient in fp32.

The backward of addition and norm reads both outputs' gradients and writes one, which is x's and delta's alike. Each
row's statistic is formed in fp32 and kept. The gain's gradient is summed over each program's rows, and then over
programs, whose number depends on no GPU: same inputs, same bits.

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

_ELEMENTS = 1024
"""That a warp holds at a time of each tensor, unless a row has more: four loads of 16 bytes a thread."""
_PROGRAMS = 256
"""Of the backward, at most, if they have four warps: about two for each multiprocessor of an H200, where more were
slower (by 5% twice as many). It divides the usual numbers of tokens."""
_MAX_WIDTH = 16_384
_OPTIONS = {"enable_fp_fusion": False}  # said, as Triton 3.10 changes the default


@triton.jit(do_not_specialize=["n_rows"])
def _norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    scale_ptr,
    x_row,
    n_rows,
    width,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < n_rows) & (column < width)
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        total = (x + delta).to(tl.bfloat16)
        tl.store(total_ptr + row * width + column, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    tl.store(out_ptr + row * width + column, (x * scale * weight).to(tl.bfloat16), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def _norm_backward_kernel(
    dout_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    dweight_ptr,
    x_row,
    n_rows,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, WIDTH), tl.float32)
    begin, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    x = _load(x_ptr, x_row, begin, n_rows, width, ROWS, WIDTH)
    dout = _load(dout_ptr, width, begin, n_rows, width, ROWS, WIDTH)
    dtotal = dout
    if ADD:
        dtotal = _load(dtotal_ptr, width, begin, n_rows, width, ROWS, WIDTH)
    for first in range(begin, n_rows, step):
        # The next rows are on their way while these are worked on.
        next_x = _load(x_ptr, x_row, first + step, n_rows, width, ROWS, WIDTH)
        next_dout = _load(dout_ptr, width, first + step, n_rows, width, ROWS, WIDTH)
        next_dtotal = next_dout
        if ADD:
            next_dtotal = _load(dtotal_ptr, width, first + step, n_rows, width, ROWS, WIDTH)
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        scale = tl.load(scale_ptr + row, mask=row < n_rows, other=0.0)
        normed, dout = x.to(tl.float32) * scale, dout.to(tl.float32)
        gained = dout * weight
        dx = (gained - normed * (tl.sum(gained * normed, 1, keep_dims=True) / width)) * scale
        if ADD:
            dx += dtotal.to(tl.float32)
        tl.store(dx_ptr + row * width + column, dx.to(tl.bfloat16), mask=(row < n_rows) & (column < width))
        dweight += tl.sum(dout * normed, 0, keep_dims=True)
        x, dout, dtotal = next_x, next_dout, next_dtotal
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + column, dweight, mask=column < width)


@triton.jit
def _load(pointer, stride, first, n_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + row * stride + column, mask=(row < n_rows) & (column < width), other=0.0)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `nmoe.kernels.reference.norm.rms_norm`: bf16; the gain's gradient goes to its `main_grad`, if any, in fp32.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together, or a width above 16,384.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


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
    return _AddRMSNorm.apply(x, delta, weight, eps)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        _, out, scale_R = _forward(x, None, weight, eps)
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
        total, out, scale_R = _forward(x, delta, weight, eps)
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


def _forward(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum (x itself, if there is no delta), its norm, and what each row was multiplied by, fp32 (R,)."""
    x_RD, out = _rows(x), x.new_empty(x.shape)
    n_rows, width = x_RD.shape
    total = x if delta is None else torch.empty_like(out)
    scale_R = x.new_empty(n_rows, dtype=torch.float32)
    if out.numel():
        sizes = _sizes(width)
        tensors = (x_RD, x_RD if delta is None else delta.contiguous(), weight, total, out, scale_R)
        numbers = (x_RD.stride(0), n_rows, width, eps)
        with torch.cuda.device_of(x):
            _norm_kernel[(triton.cdiv(n_rows, sizes["ROWS"]),)](
                *tensors, *numbers, ADD=delta is not None, **sizes, **_OPTIONS
            )
    return total, out, scale_R


def _backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    scale_R: torch.Tensor,
    weight: torch.Tensor,
    wants_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the norm's input, the sum's own added, and of the gain unless that has a `main_grad`."""
    x_RD, dout, dx = _rows(x), dout.contiguous(), x.new_empty(x.shape)
    n_rows, width = x_RD.shape
    sizes = _sizes(width)
    programs = min(max(1, _PROGRAMS * 4 // sizes["num_warps"]), triton.cdiv(n_rows, sizes["ROWS"]))
    dweight_PD = x.new_empty(programs, width, dtype=torch.float32)
    if programs:
        tensors = (dout, dout if dtotal is None else dtotal.contiguous(), x_RD, weight, scale_R, dx, dweight_PD)
        numbers = (x_RD.stride(0), n_rows, width)
        with torch.cuda.device_of(x):
            _norm_backward_kernel[(programs,)](*tensors, *numbers, ADD=dtotal is not None, **sizes, **_OPTIONS)
    return dx, deliver(weight, dweight_PD.sum(0)) if wants_dweight else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(R, D) with dense rows: a view where strides allow it, as they do for some columns of a projection."""
    x_RD = x.reshape(-1, x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _sizes(width: int) -> dict[str, int]:
    """Warps beside each other fill a row, so that a thread has the same columns of all of its rows."""
    padded = triton.next_power_of_2(width)
    warps = min(max(padded // 256, 1), 16)
    return {"ROWS": max(1, _ELEMENTS * warps // padded), "WIDTH": padded, "num_warps": warps}


def _ahead(name: str, add: bool, width: int, backward: bool) -> TritonKernel:
    names = ("dout", "dtotal", "x", "weight", "scale", "dx", "dweight") if backward else _FORWARD
    pointers = {f"{name}_ptr": "*fp32" if name in ("scale", "dweight") else "*bf16" for name in names}
    numbers = {"x_row": "i32", "n_rows": "i32", "width": "i32"} | ({} if backward else {"eps": "fp32"})
    sizes = _sizes(width)
    return TritonKernel(
        f"{name}_backward_{width}" if backward else f"{name}_{width}",
        __name__,
        "_norm_backward_kernel" if backward else "_norm_kernel",
        ("sm_90a", "sm_100a"),
        tuple((pointers | numbers).items()),
        constants=(("ADD", add), ("ROWS", sizes["ROWS"]), ("WIDTH", sizes["WIDTH"])),
        aligned=(*pointers, "x_row", "width"),
        options=(("num_warps", sizes["num_warps"]), *_OPTIONS.items()),
    )


_FORWARD = ("x", "delta", "weight", "total", "out", "scale")

TRITON_KERNELS: tuple[TritonKernel, ...] = tuple(
    _ahead(name, name == "add_rms_norm", width, backward)
    for name, widths in (("rms_norm", (512, 1024, 2048)), ("add_rms_norm", (1024, 2048)))
    for width in widths
    for backward in (False, True)
)
"""What is compiled ahead: for widths up to these powers of two, multiples of 16."""
