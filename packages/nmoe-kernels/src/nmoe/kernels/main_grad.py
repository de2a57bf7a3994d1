"""Where weight gradients go.

A trainer that wants fp32 gradients of bf16 weights gives each parameter an attribute `main_grad`: an fp32 tensor of its
shape, at a multiple of 16 bytes. Ops with hand-derived backwards write to it and hand autograd nothing; without it they
return an ordinary gradient. A trainer that sets `main_grad_stale = True` beside it need not clear it: the next gradient
overwrites what is there.
"""

import torch
from nmoe.kernels.errors import ShapeError


def accumulator_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter's accumulator, if a trainer has given it one.

    Raises:
        ShapeError: it is not of the weight's shape, or on another device.
    """
    accumulator: torch.Tensor | None = getattr(weight, "main_grad", None)
    if accumulator is not None and (accumulator.shape != weight.shape or accumulator.device != weight.device):
        raise ShapeError(
            f"expected a main_grad {tuple(weight.shape)} on {weight.device}, found {tuple(accumulator.shape)} on "
            f"{accumulator.device}: allocate it with torch.empty_like(weight, dtype=torch.float32)"
        )
    return accumulator


def claim(weight: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """The parameter's accumulator, if a trainer has given it one, and whether to add to it rather than overwrite it.

    The caller must write every element: what stands there counts from now on.

    Raises:
        ShapeError: as `accumulator_of`.
    """
    accumulator = accumulator_of(weight)
    if accumulator is None:
        return None
    add = not getattr(weight, "main_grad_stale", False)
    weight.main_grad_stale = False  # type: ignore[attr-defined]
    return accumulator, add


def deliver(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor | None:
    """Puts `grad` into the accumulator and returns None, or returns it in the weight's dtype for autograd."""
    claimed = claim(weight)
    if claimed is None:
        return grad.to(weight.dtype)
    accumulator, add = claimed
    if add:
        accumulator.add_(grad)
    else:
        accumulator.copy_(grad)
    return None
