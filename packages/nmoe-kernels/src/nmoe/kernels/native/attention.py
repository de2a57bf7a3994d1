"""Attention of the native tier: cuDNN's forward for global layers, our kernels for all else; always the same bits."""

import torch
from nmoe.kernels.native.attention_cudnn import global_attention
from nmoe.kernels.native.attention_window_triton import window_attention
from nmoe.kernels.reference import attention as reference


def attention(
    q_BHSd: torch.Tensor, k_BHLd: torch.Tensor, v_BHLv: torch.Tensor, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention; see `nmoe.kernels.reference.attention.attention` for shapes and errors.

    A few queries against the keys of a cache, and single ones, are the reference's: no kernel here is made for them.
    """
    reference.check_attention_shapes(q_BHSd, k_BHLd, v_BHLv, window)
    queries, keys = q_BHSd.shape[2], k_BHLd.shape[2]
    if queries != keys or queries == 1:
        return reference.attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window)
    if window is None or window >= keys:
        return global_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale)
    return window_attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window)
