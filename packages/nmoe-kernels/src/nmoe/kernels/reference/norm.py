"""RMSNorm (arXiv:1910.07467)."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, the mean in fp32 or wider.

    Args:
        x: (…, D), any float dtype.
        weight: (D,), of x's dtype.
        eps: added to the mean square.

    Returns:
        (…, D) of x's dtype.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
