"""The routed experts of one rank: gather, SwiGLU MLPs, gated combine, with a hand-derived backward.

The backward costs twice the forward: nothing is recomputed but the activation, and only the input, the pre-activation
and the indices are kept. The gate's gradient comes from ungated rows, so a gate of zero divides nothing.

Shapes: T tokens, D model width, F expert width, e experts, K experts per token, R = T·K rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import claim
from nmoe.kernels.reference.swiglu import swiglu_backward, swiglu_forward


class GroupedGemms(NamedTuple):
    """The two products that the experts are made of; signatures in `nmoe.kernels.reference.grouped_gemm`."""

    grouped_gemm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    grouped_wgrad: Callable[..., None]


class RowIndex(Protocol):
    """What the experts read of an index, int32 or int64; see `nmoe.kernels.reference.routing.RowIndex`."""

    @property
    def order_R(self) -> torch.Tensor:
        """Flat (token, slot) index of each row."""
        ...

    @property
    def row_TK(self) -> torch.Tensor:
        """The row of each (token, slot)."""
        ...

    @property
    def offset_E(self) -> torch.Tensor:
        """First row of each expert, and the number of rows."""
        ...


def experts(
    gemms: GroupedGemms,
    x_TD: torch.Tensor,
    index: RowIndex,
    gate_TK: torch.Tensor,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
) -> torch.Tensor:
    """`Σ_k gate[t, k] · expert_{expert[t, k]}(x[t])`, summed in slot order in fp32.

    Args:
        gemms: the grouped products to use.
        x_TD: tokens.
        index: the tokens' rows in expert order (`nmoe.kernels.reference.routing.index_rows`).
        gate_TK: fp32 weights (fp64 for gradient checks).
        w13_e2FD: gate and up projections.
        w2_eDF: down projections.

    Returns:
        (T, D) of x's dtype.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    n_experts, two, hidden, width = w13_e2FD.shape
    if two != 2 or x_TD.shape[1] != width or w2_eDF.shape != (n_experts, width, hidden):
        raise ShapeError(
            "expected x (T, D), w13 (e, 2, F, D), w2 (e, D, F); "
            f"found {tuple(x_TD.shape)}, {tuple(w13_e2FD.shape)}, {tuple(w2_eDF.shape)}"
        )
    if index.row_TK.shape != gate_TK.shape or gate_TK.shape[0] != x_TD.shape[0]:
        raise ShapeError(
            f"expected rows and gates (T, K) with T = {x_TD.shape[0]}; "
            f"found {tuple(index.row_TK.shape)} and {tuple(gate_TK.shape)}"
        )
    return _Experts.apply(gemms, x_TD, index, gate_TK, w13_e2FD, w2_eDF)


def expert_rows(
    gemms: GroupedGemms,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    offset_E: torch.Tensor,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's output, not gated, (R, D), and its pre-activation, (R, 2F), which the backward needs.

    Args:
        gemms: the grouped products to use.
        x_TD: what `token_R` picks the rows from, in expert order.
        token_R: the token of each row.
        offset_E: the first row of each expert, and the number of rows.
        w13_e2FD: gate and up projections.
        w2_eDF: down projections.
    """
    pre_R2F = gemms.grouped_gemm(x_TD[token_R], w13_e2FD.flatten(1, 2).transpose(1, 2), offset_E)
    return gemms.grouped_gemm(swiglu_forward(pre_R2F), w2_eDF.transpose(1, 2), offset_E), pre_R2F


class RowGradients(NamedTuple):
    """What the backward of the rows gives."""

    dx_RD: torch.Tensor
    """Each row's gradient of its token."""
    dgate_R: torch.Tensor
    """Of each row's gate, from ungated rows."""
    dw13: torch.Tensor | None
    """None where the weight's `main_grad` has it, or none was asked for."""
    dw2: torch.Tensor | None


def expert_rows_backward(
    gemms: GroupedGemms,
    dout_TD: torch.Tensor,
    x_TD: torch.Tensor,
    token_R: torch.Tensor,
    gate_R: torch.Tensor,
    pre_R2F: torch.Tensor,
    offset_E: torch.Tensor,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
) -> RowGradients:
    """The backward of the sum of gated rows. `dout_TD` is what `token_R` picks the rows' gradients from; the rest is as
    `expert_rows` was given it, or gave it."""
    gate_R1 = gate_R[:, None]
    dout_RD = dout_TD[token_R]
    dh_RF = gemms.grouped_gemm(dout_RD, w2_eDF, offset_E)  # of ungated rows
    h_RF = swiglu_forward(pre_R2F)
    wide = torch.promote_types(h_RF.dtype, gate_R.dtype)
    dgate_R = (dh_RF.to(wide) * h_RF).sum(-1)
    dpre_R2F = swiglu_backward((dh_RF * gate_R1).to(h_RF.dtype), pre_R2F)
    del dh_RF

    dw2 = _wgrad(gemms, dout_RD, (h_RF * gate_R1).to(h_RF.dtype), offset_E, w2_eDF)
    del dout_RD, h_RF
    dw13 = _wgrad(gemms, dpre_R2F, x_TD[token_R], offset_E, w13_e2FD)
    return RowGradients(gemms.grouped_gemm(dpre_R2F, w13_e2FD.flatten(1, 2), offset_E), dgate_R, dw13, dw2)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gemms: GroupedGemms,
        x_TD: torch.Tensor,
        index: RowIndex,
        gate_TK: torch.Tensor,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> torch.Tensor:
        token_R = index.order_R // gate_TK.shape[1]
        y_RD, pre_R2F = expert_rows(gemms, x_TD, token_R, index.offset_E, w13_e2FD, w2_eDF)
        ctx.gemms, ctx.w13, ctx.w2 = gemms, w13_e2FD, w2_eDF
        ctx.save_for_backward(x_TD, gate_TK, pre_R2F, index.order_R, index.row_TK, index.offset_E)
        return _sum_slots(y_RD, index.row_TK, gate_TK)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gate_TK, pre_R2F, order_R, row_TK, offset_E = ctx.saved_tensors
        token_R, gate_R = order_R // gate_TK.shape[1], gate_TK.reshape(-1)[order_R]
        rows = expert_rows_backward(ctx.gemms, grads[0], x_TD, token_R, gate_R, pre_R2F, offset_E, ctx.w13, ctx.w2)
        dgate_TK = rows.dgate_R[row_TK].to(gate_TK.dtype)
        return None, _sum_slots(rows.dx_RD, row_TK, None), None, dgate_TK, rows.dw13, rows.dw2


def _wgrad(
    gemms: GroupedGemms, a_RM: torch.Tensor, b_RN: torch.Tensor, offset_E: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor | None:
    if not weight.requires_grad:
        return None
    claimed = claim(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    into, add = (torch.empty_like(weight, dtype=wide), False) if claimed is None else claimed
    gemms.grouped_wgrad(a_RM, b_RN, offset_E, into.view(weight.shape[0], a_RM.shape[1], b_RN.shape[1]), add=add)
    return into.to(weight.dtype) if claimed is None else None


def _sum_slots(y_RD: torch.Tensor, row_TK: torch.Tensor, gate_TK: torch.Tensor | None) -> torch.Tensor:
    """A token's rows summed in slot order, in fp32 or wider, gated if gates are given."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    out_TD = torch.zeros(row_TK.shape[0], y_RD.shape[1], dtype=wide, device=y_RD.device)
    for slot in range(row_TK.shape[1]):
        rows_TD = y_RD[row_TK[:, slot]]
        if gate_TK is None:
            out_TD.add_(rows_TD)
        else:
            out_TD.addcmul_(rows_TD.to(wide), gate_TK[:, slot, None])
    return out_TD.to(y_RD.dtype)
