"""Queries and keys of plain attention in one pass each way: norm over a head, and RoPE.

Forward it reads queries and keys of the product once and writes them once; values stay where the product wrote them.
Backward it reads the three gradients, and queries and keys again if they are normed, and writes the product's gradient
once: values go through the op so that this is not put together by further passes. Nothing is kept but the product and
the position tables. All in fp32 and rounded once; the gains' gradients are summed over each program's heads, and then
by `gain_cuda` over programs, whose number depends on no GPU: same inputs, same bits.

Shapes: B batch, S positions, T = B·S tokens, H heads, d head width, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native.gain_cuda import deliver_sums
from nmoe.kernels.native.rope_triton import angles, turn
from nmoe.kernels.reference.qkv import Gains, check_qkv_shapes
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_ELEMENTS, _ELEMENTS_BACKWARD = 512, 256
"""That a program, one warp, holds at a time of each tensor: two loads of 16 bytes a thread, or one."""
_HEADS = 4
"""Of a token, that a program takes at a time, at most; of so many tokens that this makes the elements."""
_PROGRAMS = 2048
"""Of the backward, at most: some fifteen for each multiprocessor of an H100, all of them there at once."""
_MAX_WIDTH = 256
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default


@triton.jit(do_not_specialize=["n_tokens", "length", "heads"])
def _qkv_heads_kernel(
    qkv_ptr,
    q_gain_ptr,
    k_gain_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    n_tokens,
    length,
    heads,
    half,
    eps,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    token = tl.program_id(0).to(tl.int64) * TOKENS + row // HEADS
    width = 2 * half
    cos, sin = angles(cos_ptr, sin_ptr, token % length, half, WIDTH)
    q_gain, k_gain = _gain(q_gain_ptr, width, NORM, WIDTH), _gain(k_gain_ptr, width, NORM, WIDTH)
    keys = n_tokens.to(tl.int64) * heads * width
    for first in range(0, heads, HEADS):
        head = first + row % HEADS
        inside = (token < n_tokens) & (head < heads) & (column < width)
        at = qkv_ptr + (token * 3 * heads + head) * width + column
        q = tl.load(at, mask=inside, other=0.0)
        k = tl.load(at + heads * width, mask=inside, other=0.0)
        out_at = out_ptr + (token * heads + head) * width + column
        tl.store(out_at, _part(q, q_gain, cos, sin, width, eps, NORM), mask=inside)
        tl.store(out_at + keys, _part(k, k_gain, cos, sin, width, eps, NORM), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "length", "heads"])
def _qkv_heads_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_gain_ptr,
    k_gain_ptr,
    cos_ptr,
    sin_ptr,
    dqkv_ptr,
    dgain_ptr,
    dq_batch,
    dq_token,
    dq_head,
    dk_batch,
    dk_token,
    dk_head,
    dv_batch,
    dv_token,
    dv_head,
    n_tokens,
    length,
    heads,
    half,
    eps,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    width = 2 * half
    q_gain, k_gain = _gain(q_gain_ptr, width, NORM, WIDTH), _gain(k_gain_ptr, width, NORM, WIDTH)
    dq_gain = tl.zeros((TOKENS * HEADS, WIDTH), tl.float32)
    dk_gain = tl.zeros((TOKENS * HEADS, WIDTH), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_tokens, TOKENS), tl.num_programs(0)):
        token = (block * TOKENS + row // HEADS).to(tl.int64)
        batch, position = token // length, token % length
        cos, sin = angles(cos_ptr, sin_ptr, position, half, WIDTH)
        dq_at = dq_ptr + batch * dq_batch + position * dq_token + column
        dk_at = dk_ptr + batch * dk_batch + position * dk_token + column
        dv_at = dv_ptr + batch * dv_batch + position * dv_token + column
        for first in range(0, heads, HEADS):
            head = (first + row % HEADS).to(tl.int64)
            inside = (token < n_tokens) & (head < heads) & (column < width)
            q_place = (token * 3 * heads + head) * width + column
            k_place, v_place = q_place + heads * width, q_place + 2 * heads * width
            # All loads first: no store holds one up.
            dq = tl.load(dq_at + head * dq_head, mask=inside, other=0.0)
            dk = tl.load(dk_at + head * dk_head, mask=inside, other=0.0)
            dv = tl.load(dv_at + head * dv_head, mask=inside, other=0.0)
            q, k = dq, dk
            if NORM:
                q = tl.load(qkv_ptr + q_place, mask=inside, other=0.0)
                k = tl.load(qkv_ptr + k_place, mask=inside, other=0.0)
            dx, change = _part_backward(dq, q, q_gain, cos, sin, width, eps, NORM)
            dq_gain += change
            tl.store(dqkv_ptr + q_place, dx.to(tl.bfloat16), mask=inside)
            dx, change = _part_backward(dk, k, k_gain, cos, sin, width, eps, NORM)
            dk_gain += change
            tl.store(dqkv_ptr + k_place, dx.to(tl.bfloat16), mask=inside)
            tl.store(dqkv_ptr + v_place, dv, mask=inside)
    if NORM:
        dgain_at = dgain_ptr + tl.program_id(0) * 2 * width + column
        tl.store(dgain_at, tl.sum(dq_gain, 0, keep_dims=True), mask=column < width)
        tl.store(dgain_at + width, tl.sum(dk_gain, 0, keep_dims=True), mask=column < width)


@triton.jit
def _part(x, gain, cos, sin, width, eps, NORM: tl.constexpr):
    x = x.to(tl.float32)
    if NORM:
        x = x * _scale(x, width, eps) * gain
    return turn(x, cos, sin).to(tl.bfloat16)


@triton.jit
def _part_backward(dout, x, gain, cos, sin, width, eps, NORM: tl.constexpr):
    """Gradients of queries or keys as projected, and each head's share of their gain's."""
    dx = turn(dout, cos, -sin)
    change = tl.zeros_like(dx)
    if NORM:
        x = x.to(tl.float32)
        scale = _scale(x, width, eps)
        normed, gained = x * scale, dx * gain
        change = dx * normed
        dx = (gained - normed * (tl.sum(gained * normed, 1, keep_dims=True) / width)) * scale
    return dx, change


@triton.jit
def _scale(x, width, eps):
    return 1 / tl.sqrt_rn(tl.sum(x * x, 1, keep_dims=True) / width + eps)


@triton.jit
def _gain(gain_ptr, width, NORM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    gain = tl.zeros((1, WIDTH), tl.float32)
    if NORM:
        gain = tl.load(gain_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    return gain


def qkv_heads(
    qkv_BS3Hd: torch.Tensor, gains: Gains | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `nmoe.kernels.reference.qkv.qkv_heads`: bf16, with fp32 tables, and no gradient for these. The gains'
    gradients go to their `main_grad`, if any, in fp32.

    Returns:
        q and k as (B, H, S, d) views of memory in the order (B, S, H, d), v as such a view of the product.

    Raises:
        ShapeError: another dtype, or shapes or devices that do not belong together, or a head wider than 256.
    """
    check_qkv_shapes(qkv_BS3Hd, gains, cos, sin)
    narrow, wide = (qkv_BS3Hd, *(gains or ())), (cos, sin)
    fits = (
        all(tensor.dtype == torch.bfloat16 for tensor in narrow)
        and all(tensor.dtype == torch.float32 for tensor in wide)
        and len({tensor.device for tensor in (*narrow, *wide)}) == 1
        and qkv_BS3Hd.shape[-1] <= _MAX_WIDTH
    )
    if not fits:
        raise ShapeError(
            f"expected qkv and gains of torch.bfloat16, d ≤ {_MAX_WIDTH}, and tables of torch.float32 on one device; "
            f"found {', '.join(f'{tuple(t.shape)} {t.dtype} on {t.device}' for t in (*narrow, *wide))}: convert them, "
            "or set runtime.kernels = 'reference'"
        )
    q, k, v = _QkvHeads.apply(qkv_BS3Hd, *(gains or (None, None)), eps, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _QkvHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BS3Hd: torch.Tensor,
        q_gain: torch.Tensor | None,
        k_gain: torch.Tensor | None,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv_BS3Hd, cos, sin = qkv_BS3Hd.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.gains, ctx.eps = (q_gain, k_gain), eps  # the very parameters: their main_grad is looked up later
        ctx.save_for_backward(cos, sin, *(() if q_gain is None else (qkv_BS3Hd,)))
        batch, length, _, heads, width = qkv_BS3Hd.shape
        out_2BSHd = qkv_BS3Hd.new_empty(2, batch, length, heads, width)
        sizes = _sizes(width, _ELEMENTS)
        if out_2BSHd.numel():
            tensors = (qkv_BS3Hd, *_gain_arguments(q_gain, k_gain, qkv_BS3Hd), cos, sin, out_2BSHd)
            with torch.cuda.device_of(qkv_BS3Hd):
                _qkv_heads_kernel[(triton.cdiv(batch * length, sizes["TOKENS"]),)](
                    *tensors,
                    *(batch * length, length, heads, width // 2, eps),
                    NORM=q_gain is not None,
                    **sizes,
                    **_OPTIONS,
                )
        return out_2BSHd[0], out_2BSHd[1], qkv_BS3Hd[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        batch, length, heads, width = grads[0].shape
        dqkv_BS3Hd = grads[0].new_empty(batch, length, 3, heads, width)
        sizes = _sizes(width, _ELEMENTS_BACKWARD)
        programs = min(_PROGRAMS, triton.cdiv(batch * length, sizes["TOKENS"]))
        dgain_P2d = grads[0].new_empty(programs, 2, width, dtype=torch.float32)
        if programs:
            qkv_BS3Hd = saved[0] if saved else dqkv_BS3Hd
            q_gain, k_gain = ctx.gains
            tables_and_gains = (*_gain_arguments(q_gain, k_gain, qkv_BS3Hd), cos, sin)
            strides = (stride for grad in grads for stride in grad.stride()[:3])
            with torch.cuda.device_of(dqkv_BS3Hd):
                _qkv_heads_backward_kernel[(programs,)](
                    *(*grads, qkv_BS3Hd, *tables_and_gains, dqkv_BS3Hd, dgain_P2d),
                    *strides,
                    *(batch * length, length, heads, width // 2, ctx.eps),
                    NORM=bool(saved),
                    **sizes,
                    **_OPTIONS,
                )
        dgains = deliver_sums(ctx.gains, dgain_P2d, ctx.needs_input_grad[1:3]) if saved else (None, None)
        return dqkv_BS3Hd, *dgains, None, None, None


def _gain_arguments(
    q_gain: torch.Tensor | None, k_gain: torch.Tensor | None, instead: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense, and something to pass where there are none, which the kernels do not read."""
    if q_gain is None or k_gain is None:
        return instead, instead
    return q_gain.contiguous(), k_gain.contiguous()


def _sizes(width: int, elements: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    heads = min(_HEADS, elements // padded)
    return {"TOKENS": elements // padded // heads, "HEADS": heads, "WIDTH": padded}


_STRIDES = tuple(f"{name}_{place}" for name in ("dq", "dk", "dv") for place in ("batch", "token", "head"))


def _ahead(width: int, norm: bool, backward: bool) -> TritonKernel:
    read = ("qkv", "q_gain", "k_gain", "cos", "sin")
    tensors = ("dq", "dk", "dv", *read, "dqkv", "dgain") if backward else (*read, "out")
    pointers = {f"{name}_ptr": "*fp32" if name in ("cos", "sin", "dgain") else "*bf16" for name in tensors}
    counts = (*(_STRIDES if backward else ()), "n_tokens", "length", "heads", "half")
    types = pointers | dict.fromkeys(counts, "i32") | {"eps": "fp32"}
    return TritonKernel(
        f"qkv_heads{'_backward' * backward}_{width}{'_norm' * norm}",
        __name__,
        "_qkv_heads_backward_kernel" if backward else "_qkv_heads_kernel",
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=(("NORM", norm), *_sizes(width, _ELEMENTS_BACKWARD if backward else _ELEMENTS).items()),
        aligned=tuple(argument for argument in types if argument not in ("n_tokens", "length", "heads", "eps")),
        options=tuple(_OPTIONS.items()),
    )


TRITON_KERNELS: tuple[TritonKernel, ...] = tuple(
    _ahead(width, norm, backward) for width in (64, 128) for norm in (False, True) for backward in (False, True)
)
"""What is compiled ahead: for heads of 64 and 128, with norms and without."""
