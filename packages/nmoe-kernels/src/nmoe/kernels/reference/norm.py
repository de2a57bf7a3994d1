"""RMSNorm (arXiv:1910.07467) with a hand-derived backward, alone and after a residual's addition.

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


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual stream after an addition, and its RMSNorm: `(x + delta, rms_norm(x + delta, weight, eps))`.

    The stream goes through the op: where it goes on from the first output alone, no gradients are added outside.

    Args:
        x: (…, D), any float dtype.
        delta: of x's shape and dtype; None: nothing is added, and the first output is x.
        weight: (D,), of x's dtype.
        eps: added to the mean square.

    Returns:
        The sum and its norm, (…, D) of x's dtype. The norm is that of the sum as rounded.
    """
    if x.is_cuda:
        total = x if delta is None else x + delta
        return total, rms_norm(total, weight, eps)
    return _AddRMSNorm.apply(x, delta, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scale = _normalize(x, eps)
        ctx.save_for_backward(normed, weight, scale)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = _gradients(grads[0], *ctx.saved_tensors)
        return dx.to(grads[0].dtype), dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x if delta is None else x + delta
        normed, scale = _normalize(total, eps)
        ctx.save_for_backward(normed, weight, scale)
        ctx.set_materialize_grads(False)  # the last sum of a model leads nowhere
        ctx.has_delta = delta is not None
        return total, (normed * weight).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dtotal, dout = grads
        dx, dweight = dtotal, None
        if dout is not None:
            dx, dweight = _gradients(dout, *ctx.saved_tensors)
            dx = (dx if dtotal is None else dx.add_(dtotal)).to(dout.dtype)
        return dx, dx if ctx.has_delta else None, dweight, None


def _normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x over its root mean square, and what it is multiplied by for that; in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide * scale, scale


def _gradients(
    dout: torch.Tensor, normed: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the norm's input, not rounded yet, and of its gain."""
    # With n = x · scale: dx = scale · (w·dy − n · mean(w·dy·n)), dw = Σ dy·n.
    dy = dout.to(normed.dtype)
    product = dy * normed
    mean = product @ weight.to(normed.dtype)[:, None] / normed.shape[-1]
    dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(scale)
    return dx, product.flatten(0, -2).sum(0).to(weight.dtype)
