"""The 2-norm of many tensors taken as one vector: what gradients are clipped by."""

from collections.abc import Sequence

import torch


def global_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`sqrt(Σ x²)` over all elements of all tensors. Same inputs, same bits; nothing waits for the device.

    Args:
        tensors: fp32, contiguous, on one device; one or more.

    Returns:
        fp32 scalar on the device; NaN or infinite where an element is, or where the squares' sum overflows.
    """
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
