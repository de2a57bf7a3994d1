"""Linear + cross-entropy in chunks of rows, so that T×V logits never exist.

The gradients are formed beside the loss, chunk by chunk, while the logits are at hand: three matrix products in all, as
a plain head would cost, and no recomputation. What stands between the products is the tier's `ScoreRows`.

Shapes: T rows, D model width, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import claim
from nmoe.kernels.reference.matmul import mm_into
from torch.autograd.function import once_differentiable

ScoreRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Scores the rows of a chunk; `score_rows` tells what it takes and writes."""

IGNORE = -100
"""Target of a row that is not scored."""

_CHUNK_ELEMENTS = 1 << 29  # 2 GiB of fp32 logits at once, at most: dweight is read and written once a chunk


def score_rows(
    logits_CV: torch.Tensor, target_C: torch.Tensor, nll_C: torch.Tensor, dlogits_CV: torch.Tensor | None
) -> None:
    """`-log softmax(logits)[target]` of each row, and its gradient.

    Args:
        logits_CV: fp32 or wider; may be written over.
        target_C: int64 ids below V, or -100.
        nll_C: written, in the logits' dtype; 0 where the target is -100.
        dlogits_CV: None, or where softmax less one-hot is written, and 0 where the target is -100. Its dtype is any; it
            may be the logits themselves.
    """
    valid_C = target_C != IGNORE
    label_C1 = target_C.clamp_min(0)[:, None]
    lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
    torch.mul((lse_C1 - logits_CV.gather(1, label_C1))[:, 0], valid_C, out=nll_C)
    if dlogits_CV is None:
        return
    logits_CV.sub_(lse_C1).exp_()
    logits_CV.scatter_(1, label_C1, logits_CV.gather(1, label_C1) - 1)
    torch.mul(logits_CV, valid_C[:, None], out=dlogits_CV)


def linear_cross_entropy(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, target_T: torch.Tensor, *, score_rows: ScoreRows = score_rows
) -> torch.Tensor:
    """Sum over rows of `-log softmax(x @ weightᵀ)[target]`; rows whose target is -100 count nothing.

    Args:
        x_TD: rows.
        weight_VD: the output head; its gradient is summed in fp32 (see `nmoe.kernels.main_grad`).
        target_T: int64 ids below V, or -100.
        score_rows: the tier's.

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
    return _LinearCrossEntropy.apply(x_TD, weight_VD, target_T, score_rows, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        score_rows: ScoreRows,
        with_grad: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        need_x, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        n_rows, vocab = x_TD.shape[0], weight_VD.shape[0]
        nll_T = x_TD.new_empty(n_rows, dtype=wide)
        dx_TD = torch.empty_like(x_TD) if need_x else None
        dweight_VD = torch.empty_like(weight_VD, dtype=wide) if need_weight else None
        rows = _chunk_rows(n_rows, vocab)
        logits_CV = x_TD.new_empty(rows, vocab, dtype=wide)
        dlogits_CV = None
        if need_x or need_weight:
            dlogits_CV = logits_CV if x_TD.dtype == wide else x_TD.new_empty(rows, vocab)
        for start in range(0, max(1, n_rows), rows):  # without rows too: dweight is then zeros
            x_CD = x_TD[start : start + rows]
            logits = logits_CV[: x_CD.shape[0]]
            dlogits = None if dlogits_CV is None else dlogits_CV[: x_CD.shape[0]]
            mm_into(logits, x_CD, weight_VD.t(), add=False)
            score_rows(logits, target_T[start : start + rows], nll_T[start : start + rows], dlogits)
            if dx_TD is not None and dlogits is not None:
                mm_into(dx_TD[start : start + rows], dlogits, weight_VD, add=False)
            if dweight_VD is not None and dlogits is not None:
                mm_into(dweight_VD, dlogits.t(), x_CD, add=start > 0)
        ctx.weight = weight_VD  # the very parameter: its main_grad is looked up when the gradient is there
        ctx.save_for_backward(dx_TD, dweight_VD)
        return nll_T.sum(dtype=torch.float64).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx_TD, dweight_VD = ctx.saved_tensors
        grad_1 = grads[0].view(1)  # a tensor of no dimensions would be rounded to dx's dtype
        # What is saved stays as it is: with retain_graph, it is wanted again.
        dx = None if dx_TD is None else torch.mul(dx_TD, grad_1, out=torch.empty_like(dx_TD))
        dweight = None if dweight_VD is None else _deliver_product(ctx.weight, dweight_VD, grad_1)
        return dx, dweight, None, None, None


def _chunk_rows(n_rows: int, vocab: int) -> int:
    """A power of two, as T mostly is too: whole chunks, whose products are whole tiles in whole waves."""
    most = max(1, _CHUNK_ELEMENTS // vocab)
    return max(1, min(n_rows, 1 << (most.bit_length() - 1)))


def _deliver_product(weight: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor | None:
    """As `main_grad.deliver` of `grad * factor`, in one pass and without a temporary."""
    claimed = claim(weight)
    if claimed is None:
        return torch.mul(grad, factor, out=torch.empty_like(weight))
    accumulator, add = claimed
    if add:
        accumulator.addcmul_(grad, factor)
    else:
        torch.mul(grad, factor, out=accumulator)
    return None
