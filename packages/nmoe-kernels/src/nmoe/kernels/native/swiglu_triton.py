"""SwiGLU in one pass each way: 6 bytes forward and 10 backward for each of T·F elements, in bf16.

Computed in fp32 and rounded once. Shapes: T rows, F hidden width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_ELEMENTS = 1024
"""Of the output that a program computes: so many columns of a row, or fewer of several rows."""
_BLOCKS = (1024, 512, 256, 128)
_MOST_PADDING = 1.1
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(pre_ptr, out_ptr, rows, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < hidden)
    gate_ptr = pre_ptr + row * 2 * hidden
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + hidden + column, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * hidden + column, out.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward_kernel(dout_ptr, pre_ptr, dpre_ptr, rows, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < hidden)
    gate_ptr = pre_ptr + row * 2 * hidden
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + hidden + column, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1 - sigmoid))
    dgate_ptr = dpre_ptr + row * 2 * hidden
    tl.store(dgate_ptr + column, dgate.to(tl.bfloat16), mask=inside)
    tl.store(dgate_ptr + hidden + column, (dout * silu).to(tl.bfloat16), mask=inside)


def swiglu(pre_T2F: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, (…, 2F) to (…, F); autograd keeps the pre-activation and nothing else.

    Args:
        pre_T2F: bf16, gate and up side by side.

    Raises:
        ShapeError: another dtype, or an odd width.
    """
    if pre_T2F.dtype != torch.bfloat16 or pre_T2F.dim() < 1 or pre_T2F.shape[-1] % 2:
        raise ShapeError(
            f"expected gate and up (…, 2F) of torch.bfloat16, found {tuple(pre_T2F.shape)} of {pre_T2F.dtype}: "
            "convert it, or set runtime.kernels = 'reference'"
        )
    return _SwiGLU.apply(pre_T2F)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_T2F: torch.Tensor) -> torch.Tensor:
        pre_T2F = pre_T2F.contiguous()
        ctx.save_for_backward(pre_T2F)
        out_TF = pre_T2F.new_empty(*pre_T2F.shape[:-1], pre_T2F.shape[-1] // 2)
        _launch(_swiglu_kernel, out_TF, pre_T2F, out_TF)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (pre_T2F,) = ctx.saved_tensors
        dout_TF, dpre_T2F = grads[0].contiguous(), torch.empty_like(pre_T2F)
        _launch(_swiglu_backward_kernel, dout_TF, dout_TF, pre_T2F, dpre_T2F)
        return dpre_T2F


def _launch(kernel: Any, like_TF: torch.Tensor, *tensors: torch.Tensor) -> None:
    hidden = like_TF.shape[-1]
    if like_TF.numel():
        rows, tile = like_TF.numel() // hidden, _tile(hidden)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(hidden, tile["BLOCK"]))
        with torch.cuda.device_of(like_TF):
            kernel[grid](*tensors, rows, hidden, **tile, **_OPTIONS)


def _tile(hidden: int) -> dict[str, int]:
    """The widest block that leaves little of its columns beyond the last."""
    fits = (block for block in _BLOCKS if triton.cdiv(hidden, block) * block <= _MOST_PADDING * hidden)
    return _tile_of(next(fits, _BLOCKS[-1]))


def _tile_of(block: int) -> dict[str, int]:
    return {"ROWS": _ELEMENTS // block, "BLOCK": block}


def _ahead(name: str, function: str, block: int, *pointers: str) -> TritonKernel:
    types = dict.fromkeys(pointers, "*bf16") | {"rows": "i32", "hidden": "i32"}
    return TritonKernel(
        f"{name}_{block}",
        __name__,
        function,
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=tuple(_tile_of(block).items()),
        aligned=(*pointers, "hidden"),
        options=tuple(_OPTIONS.items()),
    )


TRITON_KERNELS = (
    *(_ahead("swiglu", "_swiglu_kernel", block, "pre_ptr", "out_ptr") for block in _BLOCKS),
    *(
        _ahead("swiglu_backward", "_swiglu_backward_kernel", block, "dout_ptr", "pre_ptr", "dpre_ptr")
        for block in _BLOCKS
    ),
)
"""What is compiled ahead: for widths of multiples of 16."""
