"""AdamW with decoupled weight decay (arXiv:1711.05101), on fp32 weights or on bf16 weights with a 16-bit residual."""

from dataclasses import dataclass

import torch
from nmoe.kernels.reference.master import load_master, store_master


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    """Updates so far, this one included; from 1."""

    @property
    def step_size(self) -> float:
        """Learning rate over the first moment's bias correction."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def second_moment_scale(self) -> float:
        """Square root of the second moment's bias correction."""
        return float((1 - self.beta2**self.step) ** 0.5)


def adamw_(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor,
    scalars: AdamWStep,
) -> None:
    """Updates weight (and residual) and both moments in place.

    Args:
        weight: fp32, or bf16 with `residual`.
        residual: int16 (see `nmoe.kernels.reference.master`), or None for fp32 weights.
        grad: fp32; left as it is.
        exp_avg: fp32 first moment.
        exp_avg_sq: fp32 second moment.
        grad_scale: fp32 scalar on the device; multiplies the gradient (clipping).
        scalars: learning rate, betas, …
    """
    master = load_master(weight, residual)
    scaled = grad * grad_scale
    exp_avg.lerp_(scaled, 1 - scalars.beta1)
    exp_avg_sq.mul_(scalars.beta2).addcmul_(scaled, scaled, value=1 - scalars.beta2)
    denominator = (exp_avg_sq.sqrt() / scalars.second_moment_scale).add_(scalars.eps)
    master.mul_(1 - scalars.lr * scalars.weight_decay).addcdiv_(exp_avg, denominator, value=-scalars.step_size)
    store_master(master, weight, residual)
