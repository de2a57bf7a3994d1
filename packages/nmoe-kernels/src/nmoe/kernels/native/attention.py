"""Attention of the native tier: which kernels run, and when; always the same bits.

| | forward | backward |
|---|---|---|
| Hopper | CUDA | CUDA; wide heads of very long samples: Triton |
| other GPUs, a window or documents | Triton | Triton |
| other GPUs, else | cuDNN | Triton |

Kept for the backward: the inputs, the output, and for each query the score, without scale, at which a key's weight
would be 1: the logarithm of the softmax's sum, over the scale.

Shapes: B batch, H heads, S positions, d query-key width, v value width.
"""

from typing import Any

import torch
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.native import (
    attention_backward_cuda,
    attention_backward_triton,
    attention_cudnn,
    attention_forward_cuda,
    attention_window_triton,
)
from nmoe.kernels.native.attention_heads_cuda import ARCHES
from nmoe.kernels.native.attention_tiles_triton import check_heads, empty_heads
from nmoe.kernels.reference import attention as reference
from torch.autograd.function import once_differentiable


def attention(
    q_BHSd: torch.Tensor,
    k_BHLd: torch.Tensor,
    v_BHLv: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    document_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention; see `nmoe.kernels.reference.attention.attention` for shapes and errors.

    A few queries against the keys of a cache, and single ones, are the reference's: no kernel here is made for them.
    """
    reference.check_attention_shapes(q_BHSd, k_BHLd, v_BHLv, window)
    queries, keys = q_BHSd.shape[2], k_BHLd.shape[2]
    if queries != keys or queries == 1:
        return reference.attention(
            q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window, document_start_BS=document_start_BS
        )
    return attend(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window, document_start_BS=document_start_BS)


def attend(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    document_start_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query to itself and the `window - 1` positions before it; same inputs, same bits.

    Args:
        q_BHSd: bf16 queries; d a multiple of 16 up to 192.
        k_BHSd: bf16 keys.
        v_BHSv: bf16 values; v a multiple of 16 up to 128. Rows of all three must be dense and start at multiples of 16
            bytes, or they are copied.
        scale: factor on the scores before the softmax, above 0.
        window: at least 1; S or more, or None, hides nothing.
        document_start_BS: int32, for each query the first key that it may see: never decreasing along S, and at most
            the query's position, else results are undefined (no value is read on the host). None: the sample's first.

    Returns:
        (B, H, S, v), a view of memory in the order (B, S, H, v), as the gradients are too.

    Raises:
        ShapeError: a tensor or the window is not as described; the message says how to mend it.
        KernelError: the scale is not.
    """
    reference.check_attention_shapes(q_BHSd, k_BHSd, v_BHSv, window)
    check_heads(q_BHSd, k_BHSd, v_BHSv, scale)
    if document_start_BS is not None:
        reference.check_document_starts(document_start_BS, q_BHSd)
    length = q_BHSd.shape[2]
    window = length if window is None else min(window, length)
    return _forward_op(q_BHSd, k_BHSd, v_BHSv, scale, window, document_start_BS)[0]


def runs_cuda(device: torch.device) -> bool:
    """Whether the kernels in CUDA are for the device."""
    return device.type == "cuda" and detect_arch(device) in ARCHES


def _forward(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_cuda(q_BHSd.device):
        return attention_forward_cuda.forward(q_BHSd, k_BHSd, v_BHSv, scale, window, document_start_BS)
    if q_BHSd.is_cuda and document_start_BS is None and window == q_BHSd.shape[2] > 1 and q_BHSd.numel() > 0:
        return attention_cudnn.forward(q_BHSd, k_BHSd, v_BHSv, scale)
    return attention_window_triton.forward(q_BHSd, k_BHSd, v_BHSv, scale, window, document_start_BS)


def _gradients(
    dout_BHSv: torch.Tensor,
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    out_BHSv: torch.Tensor,
    level_BHS: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (dout_BHSv, q_BHSd, k_BHSd, v_BHSv, out_BHSv, level_BHS, scale, window, document_start_BS)
    if runs_cuda(q_BHSd.device) and q_BHSd.numel() > 0 and attention_backward_cuda.takes(q_BHSd, v_BHSv, window):
        return attention_backward_cuda.gradients(*arguments)
    return attention_backward_triton.attention_gradients(*arguments)


def _allocate(
    q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_heads(q_BHSd, v_BHSv.shape[3]), q_BHSd.new_empty(q_BHSd.shape[:3], dtype=torch.float32)


def _allocate_gradients(dout_BHSv: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(empty_heads(tensor, tensor.shape[3]) for tensor in arguments[:3])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *kept, ctx.scale, ctx.window, document_start_BS = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *output, document_start_BS)


@once_differentiable
def _gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grads[0] is None:
        return (None,) * 6
    *kept, document_start_BS = ctx.saved_tensors
    return *_backward_op(grads[0], *kept, ctx.scale, ctx.window, document_start_BS), None, None, None


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_TENSORS, _HOW = "Tensor q, Tensor k, Tensor v", "float scale, SymInt window, Tensor? document_start"
_LIBRARY.define(f"attention({_TENSORS}, {_HOW}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attention_backward(Tensor dout, {_TENSORS}, Tensor out, Tensor level, {_HOW}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("nmoe::attention", _allocate, lib=_LIBRARY)
torch.library.register_fake("nmoe::attention_backward", _allocate_gradients, lib=_LIBRARY)
torch.library.register_autograd("nmoe::attention", _gradient, setup_context=_keep_for_backward, lib=_LIBRARY)
_forward_op = torch.ops.nmoe.attention.default
_backward_op = torch.ops.nmoe.attention_backward.default
