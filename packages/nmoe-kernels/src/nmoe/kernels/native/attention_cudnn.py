"""Attention on Hopper: cuDNN for global layers, the blockwise reference for windows.

cuDNN's kernel is the fastest public one at MLA's head sizes 192 and 128, forward and backward.
"""

import torch
import torch.nn.functional as F
from nmoe.kernels.reference import attention as reference
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(
    q_BHSd: torch.Tensor, k_BHLd: torch.Tensor, v_BHLv: torch.Tensor, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention; see `nmoe.kernels.reference.attention.attention` for shapes and errors."""
    reference.check_attention_shapes(q_BHSd, k_BHLd, v_BHLv, window)
    queries, keys = q_BHSd.shape[2], k_BHLd.shape[2]
    if window is not None or queries != keys or queries == 1:  # cuDNN takes no sequence of one
        return reference.attention(q_BHSd, k_BHLd, v_BHLv, scale=scale, window=window)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q_BHSd, k_BHLd, v_BHLv, is_causal=True, scale=scale)
