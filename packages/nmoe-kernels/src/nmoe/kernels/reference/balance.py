"""The balance loss of a router's sigmoid scores (arXiv:2412.19437, equations 17 to 20; arXiv:2101.03961 for a batch).

Shapes: T tokens, E experts, K experts per token, G sequences.
"""

import torch


def balance_loss(logits_TE: torch.Tensor, expert_TK: torch.Tensor, *, n_sequences: int, weight: float) -> torch.Tensor:
    """`weight · E/K · Σ_e (fraction of tokens that chose e) · (mean share of e)`, summed over sequences.

    A token's shares are its sigmoid scores over their sum. A sequence whose choices or mean shares are even pays
    `weight`. Differentiable in the logits; choices are constants.

    Args:
        logits_TE: fp32 or wider; sequence after sequence.
        expert_TK: integers, each token's K different experts.
        n_sequences: equal runs of tokens, each balanced for itself; 1: over all tokens.
        weight: of each sequence's loss.

    Returns:
        A scalar of the logits' dtype.
    """
    score_TE = logits_TE.sigmoid()
    share_TE = score_TE / score_TE.sum(-1, keepdim=True)
    chosen_TE = torch.zeros_like(share_TE).scatter_(1, expert_TK.long(), 1.0)
    share_GE, chosen_GE = (x.unflatten(0, (n_sequences, -1)).mean(1) for x in (share_TE, chosen_TE))
    return (share_GE * chosen_GE).sum() * (weight * share_TE.shape[1] / expert_TK.shape[1])
