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
    # In fp64, as PyTorch's sum on a CPU loses digits with a tensor's length (4e-4 at 10 million elements), and how long
    # tensors are depends on the number of ranks.
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).to(tensors[0].dtype)
