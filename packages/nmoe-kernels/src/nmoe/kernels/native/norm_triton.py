"""RMSNorm in Triton: the forward of all rows, and the backward of those that `norm_backward_cuda` does not take.

Forward, a program has a few rows. Backward it takes rows in turn, sums their part of the gain's gradient, and the
programs' sums are then added up.

Shapes: R rows, D width, P programs' partial sums.
"""

import torch
import triton
import triton.language as tl
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.runtime.triton_aot import TritonKernel

_ELEMENTS = 1024
"""That a warp holds at a time of each tensor, unless a row has more: four loads of 16 bytes a thread."""
_PROGRAMS = 256
"""Of the backward, at most, if they have four warps: about two for each multiprocessor of an H200, where more were
slower (by 5% twice as many). It divides the usual numbers of tokens."""
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


def forward(
    x_RD: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    total: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Writes the sum, if there is something to add, and its norm; returns what each row was multiplied by, fp32 (R,).

    x has dense rows, at any distance from each other; all else is dense.
    """
    n_rows, width = x_RD.shape
    scale_R = x_RD.new_empty(n_rows, dtype=torch.float32)
    if n_rows:
        sizes = _sizes(width)
        add = delta is not None
        tensors = (x_RD, delta if add else x_RD, weight, total if add else out, out, scale_R)
        numbers = (x_RD.stride(0), n_rows, width, eps)
        with torch.cuda.device_of(x_RD):
            _norm_kernel[(triton.cdiv(n_rows, sizes["ROWS"]),)](*tensors, *numbers, ADD=add, **sizes, **_OPTIONS)
    return scale_R


def backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    x_RD: torch.Tensor,
    scale_R: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    wants_dweight: bool,
) -> torch.Tensor | None:
    """Writes the gradient of x, the sum's own added; returns that of the gain, unless it has a `main_grad`.

    x has dense rows, at any distance from each other; all else is dense.
    """
    n_rows, width = x_RD.shape
    sizes = _sizes(width)
    programs = min(max(1, _PROGRAMS * 4 // sizes["num_warps"]), triton.cdiv(n_rows, sizes["ROWS"]))
    dweight_PD = x_RD.new_empty(programs, width, dtype=torch.float32)
    if programs:
        tensors = (dout, dout if dtotal is None else dtotal, x_RD, weight, scale_R, dx, dweight_PD)
        numbers = (x_RD.stride(0), n_rows, width)
        with torch.cuda.device_of(x_RD):
            _norm_backward_kernel[(programs,)](*tensors, *numbers, ADD=dtotal is not None, **sizes, **_OPTIONS)
    return deliver(weight, dweight_PD.sum(0)) if wants_dweight else None


def _sizes(width: int) -> dict[str, int]:
    """Warps beside each other fill a row, so that a thread has the same columns of all of its rows."""
    padded = triton.next_power_of_2(width)
    warps = min(max(padded // 256, 1), 16)
    return {"ROWS": max(1, _ELEMENTS * warps // padded), "WIDTH": padded, "num_warps": warps}


def _ahead(name: str, add: bool, width: int) -> TritonKernel:
    return _kernel(f"{name}_{width}", "_norm_kernel", _FORWARD, {"eps": "fp32"}, add, width)


def _ahead_backward(name: str, add: bool, width: int) -> TritonKernel:
    return _kernel(f"{name}_backward_{width}", "_norm_backward_kernel", _BACKWARD, {}, add, width)


def _kernel(
    name: str, function: str, tensors: tuple[str, ...], more: dict[str, str], add: bool, width: int
) -> TritonKernel:
    pointers = {f"{tensor}_ptr": "*fp32" if tensor in ("scale", "dweight") else "*bf16" for tensor in tensors}
    numbers = {"x_row": "i32", "n_rows": "i32", "width": "i32"}
    sizes = _sizes(width)
    return TritonKernel(
        name,
        __name__,
        function,
        ("sm_90a", "sm_100a"),
        tuple((pointers | numbers | more).items()),
        constants=(("ADD", add), ("ROWS", sizes["ROWS"]), ("WIDTH", sizes["WIDTH"])),
        aligned=(*pointers, "x_row", "width"),
        options=(("num_warps", sizes["num_warps"]), *_OPTIONS.items()),
    )


_FORWARD = ("x", "delta", "weight", "total", "out", "scale")
_BACKWARD = ("dout", "dtotal", "x", "weight", "scale", "dx", "dweight")

TRITON_KERNELS: tuple[TritonKernel, ...] = (
    *(_ahead("rms_norm", False, width) for width in (512, 1024, 2048)),
    *(_ahead("add_rms_norm", True, width) for width in (1024, 2048)),
    _ahead_backward("rms_norm", False, 128),
    _ahead_backward("add_rms_norm", True, 128),
)
"""What is compiled ahead: for widths up to these powers of two, multiples of 16; backward, a head's."""
