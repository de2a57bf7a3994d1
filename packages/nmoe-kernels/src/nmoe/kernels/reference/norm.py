"""RMSNorm (arXiv:1910.07467) with a hand-derived backward.

Shapes: D width of the last dimension.
"""

from typing import Any

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, the mean in fp32 or wider.

    Args:
        x: (…, D), any float dtype.
        weight: (D,), of x's dtype.
        eps: added to the mean square.

    Returns:
        (…, D) of x's dtype.
    """
    if x.is_cuda:  # PyTorch has a fused kernel there; elsewhere it takes some twenty passes, forward and backward
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = wide * scale
        ctx.save_for_backward(normed, weight, scale)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With n = x · scale: dx = scale · (w·dy − n · mean(w·dy·n)), dw = Σ dy·n.
        normed, weight, scale = ctx.saved_tensors
        dy = grads[0].to(normed.dtype)
        product = dy * normed
        mean = product @ weight.to(normed.dtype)[:, None] / normed.shape[-1]
        dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return dx.to(grads[0].dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None
