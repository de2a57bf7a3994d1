"""Attention of the native tier: which kernels run, and when; always the same bits."""

import torch
from nmoe.kernels.native.attention_cudnn import global_attention
from nmoe.kernels.native.attention_window_triton import window_attention
from nmoe.kernels.reference import attention as reference


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

    Under a window the kernels are ours. Without one, or one that hides nothing, the forward is cuDNN's and the backward
    ours. Within documents, with a window or none, both are ours: cuDNN knows no documents that begin anywhere, and
    would go through all tiles of the sample, where ours leave out those that no query of a block sees.

    A few queries against the keys of a cache, and single ones, are the reference's: no kernel here is made for them.
    """
    reference.check_attention_shapes(q_BHSd, k_BHLd, v_BHLv, window)
    queries, keys = q_BHSd.shape[2], k_BHLd.shape[2]
    if queries != keys or queries == 1:
        return reference.attention(
            q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window, document_start_BS=document_start_BS
        )
    if document_start_BS is not None:
        window = keys if window is None else min(window, keys)
        return window_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window, document_start_BS=document_start_BS)
    if window is None or window >= keys:
        return global_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale)
    return window_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window)
