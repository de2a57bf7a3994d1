"""Where weight gradients go.

A trainer that wants fp32 gradients of bf16 weights gives each parameter an attribute `main_grad`: an fp32 tensor of its
shape. Ops with hand-derived backwards add to it and hand autograd nothing; without it they return an ordinary gradient.
"""

import torch


def main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter's gradient accumulator, if a trainer has given it one."""
    return getattr(weight, "main_grad", None)


def deliver(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Adds `grad` to the accumulator and returns None, or returns `grad` in the weight's dtype for autograd."""
    accumulator = main_grad(weight)
    if accumulator is None:
        return grad.to(weight.dtype)
    accumulator.add_(grad)
    return None
