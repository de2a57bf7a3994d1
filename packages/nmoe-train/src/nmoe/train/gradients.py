"""fp32 gradient accumulators, one a parameter, and what is asked of them: norm, clipping, where one is not finite."""

from collections.abc import Iterable

import torch
from torch import nn


class Gradients:
    """Gives every parameter a `main_grad` that sums over the micro-batches of a step.

    Ops with hand-derived backwards add to it themselves; the gradients that autograd leaves in `.grad` are moved there
    as soon as they are whole, so that no second copy of the model's gradients exists.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        for name, parameter in parameters:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            accumulator = torch.zeros_like(parameter, dtype=wide)
            parameter.main_grad = accumulator  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_move_to_main_grad)
            self.by_name[name] = accumulator

    def zero(self) -> None:
        """Starts a new step."""
        torch._foreach_zero_(list(self.by_name.values()))

    def norm(self) -> torch.Tensor:
        """Global 2-norm, a scalar on the device."""
        norms = torch._foreach_norm(list(self.by_name.values()))
        return torch.linalg.vector_norm(torch.stack(norms))

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradients hold a NaN or an infinity."""
        return [name for name, grad in self.by_name.items() if not bool(torch.isfinite(grad).all())]


def clip_factor(norm: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Factor that brings a gradient of this norm under `limit`; 1 where it is under it, or no limit is set."""
    if limit is None:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def _move_to_main_grad(parameter: torch.Tensor) -> None:
    if parameter.grad is None:  # an op with a hand-derived backward has added to main_grad itself
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
