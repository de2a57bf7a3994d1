"""Muon's orthogonalisation: the quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon/."""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of X ← aX + b(XXᵀ)X + c(XXᵀ)²X; chosen there for slope at zero, so that singular values end near, not at, one."""

EPS = 1e-7
"""Added to the Frobenius norm."""


def newton_schulz(matrices: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Near-orthogonal matrices with the singular vectors of the given ones, batched over leading dimensions.

    Args:
        matrices: (…, M, N), of the dtype to iterate in (bf16 on GPUs); left as they are.
        steps: iterations, 1 or more.

    Returns:
        (…, M, N) of that dtype.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    x = x.reshape(-1, *x.shape[-2:])
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.mT if tall else x
    return x.reshape(matrices.shape)
