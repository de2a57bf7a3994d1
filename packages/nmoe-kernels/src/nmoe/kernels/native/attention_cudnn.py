"""Global causal attention's forward by cuDNN, the fastest where our own is not for the device: see
`nmoe.kernels.native.attention`.

Its own backward has other bits from run to run or, where it is told not to, holds the gradients of all scores at once,
2 B H S² bytes.

Shapes: B batch, H heads, S sequence, d query-key width, v value width.
"""

import torch


def forward(
    q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attention_forward_cuda.forward`, without a window and documents, of more than one position."""
    # F.scaled_dot_product_attention calls this too, and keeps the logarithms to itself.
    out_BHSv, lse_BHS1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHSd, k_BHSd, v_BHSv, None, True, is_causal=True, scale=scale
    )
    return out_BHSv, lse_BHS1.view(q_BHSd.shape[:3]) / scale
