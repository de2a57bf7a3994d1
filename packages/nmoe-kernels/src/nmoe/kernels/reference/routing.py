"""DeepSeek-V3's router after its projection: sigmoid scores, bias-corrected and group-limited top-k, gate weights.

DeepSeek-V3 report (arXiv:2412.19437), equations 12 to 16. Shapes: T tokens, E experts, K experts per token,
R = T·K routed rows.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Which experts a token goes to."""

    expert_TK: torch.Tensor
    """int64, in falling order of biased score; ties go to the lower expert id."""
    gate_TK: torch.Tensor
    """fp32 weights: unbiased scores, normalised over the K chosen, times the route scale."""


class RowIndex(NamedTuple):
    """Routed rows in expert order."""

    order_R: torch.Tensor
    """int64: flat (token, slot) index `t·K + k` of each row."""
    row_TK: torch.Tensor
    """int64: the row of each (token, slot); the inverse of `order_R`."""
    offset_E: torch.Tensor
    """int32 (E + 1): expert e owns rows `offset[e]` to `offset[e + 1] - 1`."""


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    *,
    top_k: int,
    n_groups: int = 1,
    n_limited_groups: int = 1,
    route_scale: float = 1.0,
) -> Routing:
    """Chooses K experts a token by score + bias, and weighs them by score alone.

    With groups, a token's experts come from the `n_limited_groups` groups whose two best biased scores sum highest
    (ties: the lower group).

    Args:
        logits_TE: fp32 or wider.
        bias_E: the aux-loss-free selection bias; takes no gradient.
        top_k: K.
        n_groups: groups of E / n_groups neighbouring experts.
        n_limited_groups: groups that a token may use.
        route_scale: factor on the normalised weights.
    """
    score_TE = logits_TE.sigmoid()
    choice_TE = score_TE.detach() + bias_E
    if n_groups > 1:
        choice_TE = _mask_groups(choice_TE, n_groups, n_limited_groups)
    # A stable sort, unlike torch.topk, promises that equal scores keep the order of their ids.
    expert_TK = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen_TK = score_TE.gather(1, expert_TK)
    gate_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * route_scale
    return Routing(expert_TK, gate_TK)


def _mask_groups(choice_TE: torch.Tensor, n_groups: int, n_limited_groups: int) -> torch.Tensor:
    choice_TGe = choice_TE.unflatten(1, (n_groups, -1))
    score_TG = choice_TGe.topk(2, dim=-1).values.sum(-1)
    group_TL = torch.sort(score_TG, dim=-1, descending=True, stable=True).indices[:, :n_limited_groups]
    barred_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, group_TL, False)
    return choice_TGe.masked_fill(barred_TG[:, :, None], float("-inf")).flatten(1)


def index_rows(expert_TK: torch.Tensor, n_experts: int) -> RowIndex:
    """Stable counting order of the routed rows by expert, then token, then slot. Nothing is read back to the host."""
    flat_R = expert_TK.reshape(-1)
    sorted_R, order_R = torch.sort(flat_R, stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    edges = torch.arange(n_experts + 1, device=flat_R.device)
    offset_E = torch.searchsorted(sorted_R, edges).to(torch.int32)
    return RowIndex(order_R, row_R.view_as(expert_TK), offset_E)
