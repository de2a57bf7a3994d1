"""fp32 gradient accumulators, one a parameter, and what is asked of them: norm, clipping, where one is not finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.ops import Ops
from nmoe.train.flat import FlatParameters


class Gradients:
    """Gives every parameter a `main_grad` that sums over the micro-batches of a step: a view of its group's buffer.

    Ops with hand-derived backwards write to it themselves; the gradients that autograd leaves in `.grad` are moved
    there as soon as they are whole, so that no second copy of the model's gradients exists. A step's first gradient
    overwrites what the last step left: only accumulators that none has reached are cleared, when they are read.
    """

    def __init__(self, flat: FlatParameters[Any], ops: Ops) -> None:
        self._ops, self._parameters = ops, flat.parameters
        self._buffers = [group.zeros(torch.promote_types(group.dtype, torch.float32)) for group in flat.groups]
        self._by_name = flat.views(self._buffers)
        for name, parameter in self._parameters.items():
            parameter.main_grad = self._by_name[name]  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_move_to_main_grad)
        self.zero()

    def zero(self) -> None:
        """Starts a new step. No memory is touched: what stands in the accumulators no longer counts."""
        for parameter in self._parameters.values():
            parameter.main_grad_stale = True  # type: ignore[attr-defined]

    def replayed(self) -> None:
        """A CUDA graph has made the step: every accumulator counts, though no Python ran that would have noted it."""
        for parameter in self._parameters.values():
            parameter.main_grad_stale = False  # type: ignore[attr-defined]

    @property
    def by_name(self) -> Mapping[str, torch.Tensor]:
        """The step's gradients so far; zeros for a parameter that had none."""
        self._settle()
        return self._by_name

    @property
    def buffers(self) -> Sequence[torch.Tensor]:
        """The same, as the flat buffer of each group, in the groups' order."""
        self._settle()
        return self._buffers

    def norm(self) -> torch.Tensor:
        """Global 2-norm, a scalar on the device."""
        return self._ops.global_norm(self.buffers)

    def not_finite(self) -> list[str]:
        """Names of the parameters whose gradients hold a NaN or an infinity."""
        return [name for name, grad in self.by_name.items() if not bool(torch.isfinite(grad).all())]

    def _settle(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.main_grad_stale:  # type: ignore[attr-defined]
                self._by_name[name].zero_()
                parameter.main_grad_stale = False  # type: ignore[attr-defined]


def clip_factor(norm: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Factor that brings a gradient of this norm under `limit`; 1 where it is under it, or no limit is set."""
    if limit is None:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def _move_to_main_grad(parameter: torch.Tensor) -> None:
    if parameter.grad is None:  # an op with a hand-derived backward has written to main_grad itself
        return
    deliver(parameter, parameter.grad)
    parameter.grad = None
