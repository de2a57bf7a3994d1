"""Queries and keys of multi-head latent attention put together in one pass each way.

Forward it reads queries and key halves once and writes queries and keys once; values stay where the expansion wrote
them. Backward it reads the three gradients once and writes each projection's once: values go through the op so that the
expansion's gradient, of a key half and a value half, is not put together by further passes. Nothing is kept but the
position tables. Turned and summed in fp32, in one order, and rounded once: same inputs, same bits.

Shapes: B batch, S positions, H heads, n width without position, r RoPE width, v value width; d = n + r, x = n + v.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native.rope_triton import angles, turn
from nmoe.kernels.reference.mla import check_mla_shapes
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_HEADS = 16
"""That a program, which owns one token, takes at a time."""

_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default


@triton.jit(do_not_specialize=["length", "heads"])
def _mla_heads_kernel(
    q_ptr,
    kv_ptr,
    k_rope_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    length,
    heads,
    nope,
    half,
    value,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rope = 2 * half
    width = nope + rope
    column_N = tl.arange(0, NOPE)[None, :]
    column_R = tl.arange(0, ROPE)[None, :]
    cos, sin = angles(cos_ptr, sin_ptr, token % length, half, ROPE)
    shared = tl.load(k_rope_ptr + token * rope + column_R, mask=column_R < rope, other=0.0)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        row = token * heads + head
        inside_N = (head < heads) & (column_N < nope)
        inside_R = (head < heads) & (column_R < rope)
        q_nope = tl.load(q_ptr + row * width + column_N, mask=inside_N, other=0.0)
        q_rope = tl.load(q_ptr + row * width + nope + column_R, mask=inside_R, other=0.0)
        k_nope = tl.load(kv_ptr + row * (nope + value) + column_N, mask=inside_N, other=0.0)
        tl.store(q_out_ptr + row * width + column_N, q_nope, mask=inside_N)
        tl.store(q_out_ptr + row * width + nope + column_R, turn(q_rope, cos, sin).to(tl.bfloat16), mask=inside_R)
        tl.store(k_out_ptr + row * width + column_N, k_nope, mask=inside_N)
        tl.store(k_out_ptr + row * width + nope + column_R, tl.broadcast_to(shared, HEADS, ROPE), mask=inside_R)


@triton.jit(do_not_specialize=["length", "heads"])
def _mla_heads_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    dq_out_ptr,
    dkv_out_ptr,
    dk_rope_out_ptr,
    dq_batch,
    dq_token,
    dq_head,
    dk_batch,
    dk_token,
    dk_head,
    dv_batch,
    dv_token,
    dv_head,
    length,
    heads,
    nope,
    half,
    value,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    rope = 2 * half
    column_N = tl.arange(0, NOPE)[None, :]
    column_R = tl.arange(0, ROPE)[None, :]
    column_V = tl.arange(0, VALUE)[None, :]
    cos, sin = angles(cos_ptr, sin_ptr, position, half, ROPE)
    dq_ptr += batch * dq_batch + position * dq_token
    dk_ptr += batch * dk_batch + position * dk_token
    dv_ptr += batch * dv_batch + position * dv_token
    total = tl.zeros((HEADS, ROPE), tl.float32)
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        row = token * heads + head
        inside_N = (head < heads) & (column_N < nope)
        inside_R = (head < heads) & (column_R < rope)
        inside_V = (head < heads) & (column_V < value)
        dq_nope = tl.load(dq_ptr + head * dq_head + column_N, mask=inside_N, other=0.0)
        dq_rope = tl.load(dq_ptr + head * dq_head + nope + column_R, mask=inside_R, other=0.0)
        dk_nope = tl.load(dk_ptr + head * dk_head + column_N, mask=inside_N, other=0.0)
        dk_rope = tl.load(dk_ptr + head * dk_head + nope + column_R, mask=inside_R, other=0.0)
        dv = tl.load(dv_ptr + head * dv_head + column_V, mask=inside_V, other=0.0)
        dq_out_at = dq_out_ptr + row * (nope + rope)
        dkv_out_at = dkv_out_ptr + row * (nope + value)
        tl.store(dq_out_at + column_N, dq_nope, mask=inside_N)
        tl.store(dq_out_at + nope + column_R, turn(dq_rope, cos, -sin).to(tl.bfloat16), mask=inside_R)
        tl.store(dkv_out_at + column_N, dk_nope, mask=inside_N)
        tl.store(dkv_out_at + nope + column_V, dv, mask=inside_V)
        total += dk_rope.to(tl.float32)
    dk_rope_out = tl.sum(total, 0, keep_dims=True).to(tl.bfloat16)
    tl.store(dk_rope_out_ptr + token * rope + column_R, dk_rope_out, mask=column_R < rope)


def mla_heads(
    q_BSHd: torch.Tensor, kv_BSHx: torch.Tensor, k_rope_BSr: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `nmoe.kernels.reference.mla.mla_heads`: bf16, with fp32 tables, and no gradient for these.

    Returns:
        q, k and v as (B, H, S, ·) views of memory in the order (B, S, H, ·), which attention takes without a copy.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together.
    """
    check_mla_shapes(q_BSHd, kv_BSHx, k_rope_BSr, cos, sin)
    _check_dtypes(q_BSHd, kv_BSHx, k_rope_BSr, cos, sin)
    q, k, v = _MlaHeads.apply(q_BSHd, kv_BSHx, k_rope_BSr, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _check_dtypes(*tensors: torch.Tensor) -> None:
    expected = [torch.bfloat16] * 3 + [torch.float32] * 2
    if [tensor.dtype for tensor in tensors] != expected:
        raise ShapeError(
            "expected q, kv and k_rope of torch.bfloat16, cos and sin of torch.float32; found "
            f"{', '.join(str(tensor.dtype) for tensor in tensors)}: convert them, or set runtime.kernels = 'reference'"
        )
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ShapeError(f"expected all tensors on one device; found {', '.join(sorted(devices))}: move them to one")


class _MlaHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSHd: torch.Tensor,
        kv_BSHx: torch.Tensor,
        k_rope_BSr: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_BSHd, kv_BSHx, k_rope_BSr, cos, sin = (t.contiguous() for t in (q_BSHd, kv_BSHx, k_rope_BSr, cos, sin))
        ctx.save_for_backward(cos, sin)
        rope = k_rope_BSr.shape[-1]
        nope = q_BSHd.shape[-1] - rope
        v_BSHv = kv_BSHx[..., nope:]
        q_out_BSHd, k_out_BSHd = torch.empty_like(q_BSHd), torch.empty_like(q_BSHd)
        tensors = (q_BSHd, kv_BSHx, k_rope_BSr, cos, sin, q_out_BSHd, k_out_BSHd)
        _launch(_mla_heads_kernel, tensors, (), q_BSHd, rope, v_BSHv.shape[-1])
        return q_out_BSHd, k_out_BSHd, v_BSHv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        dq_BSHd, _, dv_BSHv = grads
        batch, length, heads, width = dq_BSHd.shape
        rope, value = 2 * cos.shape[-1], dv_BSHv.shape[-1]
        dq_out_BSHd = dq_BSHd.new_empty(dq_BSHd.shape)
        dkv_out_BSHx = dq_BSHd.new_empty(batch, length, heads, width - rope + value)
        dk_rope_out_BSr = dq_BSHd.new_empty(batch, length, rope)
        tensors = (*grads, cos, sin, dq_out_BSHd, dkv_out_BSHx, dk_rope_out_BSr)
        strides = tuple(stride for grad in grads for stride in grad.stride()[:3])
        _launch(_mla_heads_backward_kernel, tensors, strides, dq_BSHd, rope, value, VALUE=triton.next_power_of_2(value))
        return dq_out_BSHd, dkv_out_BSHx, dk_rope_out_BSr, None, None


def _launch(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    strides: tuple[int, ...],
    like_BSHd: torch.Tensor,
    rope: int,
    value: int,
    **constants: int,
) -> None:
    batch, length, heads, width = like_BSHd.shape
    if batch * length == 0:
        return
    with torch.cuda.device_of(like_BSHd):
        kernel[(batch * length,)](
            *tensors,
            *strides,
            length,
            heads,
            width - rope,
            rope // 2,
            value,
            HEADS=_HEADS,
            NOPE=triton.next_power_of_2(width - rope),
            ROPE=triton.next_power_of_2(rope),
            **constants,
            **_OPTIONS,
        )


_SIZES = ("length", "heads", "nope", "half", "value")
_STRIDES = tuple(f"{name}_{place}" for name in ("dq", "dk", "dv") for place in ("batch", "token", "head"))


def _ahead(name: str, function: str, tensors: tuple[str, ...], strides: tuple[str, ...], **constants: int) -> Any:
    pointers = {f"{tensor}_ptr": "*fp32" if tensor in ("cos", "sin") else "*bf16" for tensor in tensors}
    types = pointers | dict.fromkeys((*strides, *_SIZES), "i32")
    return TritonKernel(
        name,
        __name__,
        function,
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=tuple({"HEADS": _HEADS, "NOPE": 128, "ROPE": 64, **constants}.items()),
        aligned=tuple(argument for argument in types if argument not in ("length", "heads")),
        options=tuple(_OPTIONS.items()),
    )


TRITON_KERNELS: tuple[TritonKernel, ...] = (
    _ahead("mla_heads", "_mla_heads_kernel", ("q", "kv", "k_rope", "cos", "sin", "q_out", "k_out"), ()),
    _ahead(
        "mla_heads_backward",
        "_mla_heads_backward_kernel",
        ("dq", "dk", "dv", "cos", "sin", "dq_out", "dkv_out", "dk_rope_out"),
        _STRIDES,
        VALUE=128,
    ),
)
"""What is compiled ahead: for the widths of every released model, n = v = 128 and r = 64."""
