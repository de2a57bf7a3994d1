"""A projection whose weight's gradient goes where a trainer wants it: into `main_grad`, in fp32, by the product itself.

Autograd alone would round each micro-batch's gradient to the weight's bf16, and take a pass more to add it up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import claim
from nmoe.kernels.reference.matmul import mm_into
from torch.autograd.function import once_differentiable


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x · weightᵀ`; the products are the library's.

    Args:
        x: (…, n_in).
        weight: (…, n_in) of x's dtype, on its device; its leading dimensions are the outputs, side by side. With a
            `main_grad` (see `nmoe.kernels.main_grad`), its gradient is written there or added, and autograd gets none.

    Returns:
        (…, n_out), n_out the product of the weight's leading dimensions.

    Raises:
        ShapeError: widths, dtypes or devices that do not belong together.
    """
    fits = x.dim() >= 1 and weight.dim() >= 2 and x.shape[-1] == weight.shape[-1]
    if not fits or x.dtype != weight.dtype or x.device != weight.device:
        raise ShapeError(
            f"expected x (…, n_in) and weight (…, n_in) of one dtype on one device, found {tuple(x.shape)} of "
            f"{x.dtype} on {x.device} and {tuple(weight.shape)} of {weight.dtype} on {weight.device}: convert x to "
            "what the weight takes"
        )
    out: torch.Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the very parameter: its main_grad is looked up when the gradient is there
        return F.linear(x, weight.flatten(0, -2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        flat = weight.detach().flatten(0, -2)
        dout_TN, x_TM = grads[0].reshape(-1, flat.shape[0]), x.reshape(-1, flat.shape[1])
        dx = (dout_TN @ flat).view(x.shape) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        claimed = claim(weight)
        if claimed is None:
            return dx, (dout_TN.t() @ x_TM).view(weight.shape)
        accumulator, add = claimed
        mm_into(accumulator.view(flat.shape), dout_TN.t(), x_TM, add=add)
        return dx, None
