"""Linear + cross-entropy in chunks of rows, so that T×V logits never exist.

The gradients are formed beside the loss, chunk by chunk, while the logits are at hand: three matrix products in all, as
a plain head would cost, and no recomputation.

Shapes: T rows, D model width, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.reference.matmul import add_mm_wide, mm_wide

IGNORE = -100
"""Target of a row that is not scored."""

_CHUNK_ELEMENTS = 1 << 28  # 1 GiB of fp32 logits at once


def linear_cross_entropy(x_TD: torch.Tensor, weight_VD: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Sum over rows of `-log softmax(x @ weightᵀ)[target]`; rows whose target is -100 count nothing.

    Args:
        x_TD: rows.
        weight_VD: the output head; its gradient is summed in fp32 (see `nmoe.kernels.main_grad`).
        target_T: int64 ids below V, or -100.

    Returns:
        Scalar, fp32 or wider.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    if x_TD.dim() != 2 or x_TD.shape[1] != weight_VD.shape[1] or target_T.shape != x_TD.shape[:1]:
        raise ShapeError(
            "expected x (T, D), weight (V, D), target (T,); "
            f"found {tuple(x_TD.shape)}, {tuple(weight_VD.shape)}, {tuple(target_T.shape)}"
        )
    # A function's `needs_input_grad` does not know of no_grad: without this, validation would form gradients too.
    return _LinearCrossEntropy.apply(x_TD, weight_VD, target_T, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_VD: torch.Tensor, target_T: torch.Tensor, with_grad: bool
    ) -> torch.Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        need_x, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        dx_TD = torch.empty_like(x_TD) if need_x else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        rows = max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])
        for start in range(0, x_TD.shape[0], rows):
            x_CD, target_C = x_TD[start : start + rows], target_T[start : start + rows]
            logits_CV = mm_wide(x_CD, weight_VD.t())
            valid_C = target_C != IGNORE
            label_C1 = target_C.clamp_min(0)[:, None]
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss += ((lse_C1 - logits_CV.gather(1, label_C1))[:, 0] * valid_C).sum()
            if not (need_x or need_weight):
                continue
            dlogits_CV = logits_CV.sub_(lse_C1).exp_()
            dlogits_CV.scatter_(1, label_C1, dlogits_CV.gather(1, label_C1) - 1)
            dlogits_CV = dlogits_CV.mul_(valid_C[:, None]).to(x_TD.dtype)
            if dx_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_TD[start : start + rows])
            if dweight_VD is not None:
                add_mm_wide(dweight_VD, dlogits_CV.t(), x_CD)
        ctx.weight = weight_VD
        ctx.save_for_backward(dx_TD, dweight_VD)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_TD, dweight_VD = ctx.saved_tensors
        dx = None if dx_TD is None else (dx_TD * grads[0]).to(dx_TD.dtype)
        dweight = None if dweight_VD is None else deliver(ctx.weight, dweight_VD * grads[0])
        return dx, dweight, None, None
