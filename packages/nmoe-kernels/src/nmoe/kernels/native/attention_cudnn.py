"""Global causal attention: cuDNN's forward, the fastest public one at MLA's head sizes 192 and 128, and our backward.

cuDNN's own backward has other bits from run to run or, where it is told not to, holds the gradients of all scores at
once, 2 B H S² bytes. Ours is `nmoe.kernels.native.attention_backward_triton`, under a window that hides nothing.

Shapes: B batch, H heads, S sequence, d query-key width, v value width.
"""

from typing import Any

import torch
from nmoe.kernels.native.attention_backward_triton import attention_gradients
from nmoe.kernels.native.attention_tiles_triton import check_heads
from torch.autograd.function import once_differentiable


def global_attention(q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Causal attention over whole sequences; same inputs, same bits.

    Args:
        q_BHSd: bf16 queries; S > 1; widths as `nmoe.kernels.native.attention_window_triton.window_attention` has them.
        k_BHSd: bf16 keys.
        v_BHSv: bf16 values.
        scale: factor on the scores before the softmax, above 0.

    Returns:
        (B, H, S, v), a view of memory in the order (B, S, H, v), as the gradients are too.

    Raises:
        ShapeError: a tensor is not as described; the message says how to mend it.
        KernelError: the scale is not.
    """
    check_heads(q_BHSd, k_BHSd, v_BHSv, scale)
    out: torch.Tensor = _GlobalAttention.apply(q_BHSd, k_BHSd, v_BHSv, scale)
    return out


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, scale: float
    ) -> torch.Tensor:
        # F.scaled_dot_product_attention calls this too, and keeps the logarithms to itself.
        out_BHSv, lse_BHS1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BHSd, k_BHSd, v_BHSv, None, True, is_causal=True, scale=scale
        )
        ctx.save_for_backward(q_BHSd, k_BHSd, v_BHSv, out_BHSv, lse_BHS1.view(q_BHSd.shape[:3]) / scale)
        ctx.scale = scale
        return out_BHSv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHSd, k_BHSd, v_BHSv, out_BHSv, level_BHS = ctx.saved_tensors
        length = q_BHSd.shape[2]
        return *attention_gradients(grads[0], q_BHSd, k_BHSd, v_BHSv, out_BHSv, level_BHS, ctx.scale, length), None
