"""RoPE in one pass each way: each element is read and written once, turned in fp32 and rounded once.

Shapes: B batch, S positions, H heads, d head width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_ELEMENTS = 1024
"""Of a program: whole heads, of as many tokens as it takes."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default


@triton.jit
def angles(cos_ptr, sin_ptr, position, half, WIDTH: tl.constexpr):
    """cos and sin of the pairs of a head, (positions, WIDTH / 2)."""
    pair = tl.arange(0, WIDTH // 2)[None, :]
    cos = tl.load(cos_ptr + position * half + pair, mask=pair < half, other=0.0)
    sin = tl.load(sin_ptr + position * half + pair, mask=pair < half, other=0.0)
    return cos, sin


@triton.jit
def turn(x, cos, sin):
    """Heads (rows, WIDTH) in fp32, each pair turned by its angle; by -sin, back."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit(do_not_specialize=["n_rows", "length", "heads"])
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_batch,
    x_token,
    x_head,
    n_rows,
    length,
    heads,
    half,
    sign,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    token, head = row // heads, row % heads
    batch, position = token // length, token % length
    cos, sin = angles(cos_ptr, sin_ptr, position, half, WIDTH)
    inside = (row < n_rows) & (column < 2 * half)
    x = tl.load(x_ptr + batch * x_batch + position * x_token + head * x_head + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * 2 * half + column, turn(x, cos, sin * sign).to(tl.bfloat16), mask=inside)


def rope(x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `nmoe.kernels.reference.rope.rope`: bf16, with fp32 tables, and no gradient for these.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together.
    """
    tensors = (x_BSHd, cos, sin)
    fits = (
        x_BSHd.dim() == 4
        and cos.shape == sin.shape == (x_BSHd.shape[1], x_BSHd.shape[3] // 2)
        and x_BSHd.shape[3] % 2 == 0
        and [tensor.dtype for tensor in tensors] == [torch.bfloat16, torch.float32, torch.float32]
        and len({tensor.device for tensor in tensors}) == 1
    )
    if not fits:
        raise ShapeError(
            "expected x (B, S, H, d) of torch.bfloat16 and tables (S, d/2) of torch.float32 on one device; found "
            + ", ".join(f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in tensors)
            + ": convert them, or set runtime.kernels = 'reference'"
        )
    return _Rope.apply(x_BSHd, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turn(x_BSHd, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1.0), None, None


def _turn(x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    x_BSHd = x_BSHd if x_BSHd.stride(-1) == 1 else x_BSHd.contiguous()
    batch, length, heads, width = x_BSHd.shape
    out_BSHd = x_BSHd.new_empty(x_BSHd.shape)
    if out_BSHd.numel():
        rows, constants = batch * length * heads, _constants(width)
        sizes = (*x_BSHd.stride()[:3], rows, length, heads, width // 2, sign)
        with torch.cuda.device_of(x_BSHd):
            grid = (triton.cdiv(rows, constants["ROWS"]),)
            _turn_kernel[grid](x_BSHd, cos, sin, out_BSHd, *sizes, **constants, **_OPTIONS)
    return out_BSHd


def _constants(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, _ELEMENTS // padded), "WIDTH": padded}


_TYPES = {
    "x_ptr": "*bf16",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
    "out_ptr": "*bf16",
    **dict.fromkeys(("x_batch", "x_token", "x_head", "n_rows", "length", "heads", "half"), "i32"),
    "sign": "fp32",
}

TRITON_KERNELS = tuple(
    TritonKernel(
        f"rope_{width}",
        __name__,
        "_turn_kernel",
        ("sm_90a", "sm_100a"),
        tuple(_TYPES.items()),
        constants=tuple(_constants(width).items()),
        aligned=tuple(name for name in _TYPES if name not in ("n_rows", "length", "heads", "sign")),
        options=tuple(_OPTIONS.items()),
    )
    for width in (64, 128)
)
"""What is compiled ahead: for heads of 64 and 128."""
