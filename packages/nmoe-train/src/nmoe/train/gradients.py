"""fp32 gradient accumulators, summed over micro-batches and ranks, and what is asked of them: norm, clipping, where one
is not finite."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.ops import Ops
from nmoe.train.flat import FlatParameters
from nmoe.train.reducer import Reducer, clear_unreached

_SUMMED_AT_ONCE = 1 << 24
"""Of bits: PyTorch widens them to 8 bytes each first, 128 MiB."""


class Gradients:
    """Gives every parameter a `main_grad`, which takes its gradients, and sums them over a step.

    Ops with hand-derived backwards write to it themselves; the gradients that autograd leaves in `.grad` are moved
    there as soon as they are whole, so that no second copy of the model's gradients exists.

    Of parameters that this rank alone updates, `main_grad` is the accumulator itself: a step's first gradient
    overwrites what the last step left, and only accumulators that none has reached are cleared, when they are read. Of
    parameters that ranks divide, it holds one micro-batch's gradients; a `Reducer` adds their sum over ranks to the
    accumulators, which a rank has of its own pieces alone.
    """

    def __init__(self, flat: FlatParameters[Any], ops: Ops) -> None:
        self._ops, self._flat = ops, flat
        wide = [torch.promote_types(group.dtype, torch.float32) for group in flat.groups]
        self._sums = [group.shard_zeros(dtype) for group, dtype in zip(flat.groups, wide, strict=True)]
        divided = []
        for group, sums in zip(flat.groups, self._sums, strict=True):
            taken = group.zeros(sums.dtype) if group.divided else sums
            for name in group.shapes:
                parameter = flat.parameters[name]
                parameter.main_grad = group.view(taken, name)  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
            if group.divided:
                divided.append((group, taken, sums))
        self._reducer = Reducer(divided, flat.parameters, flat.world)
        kept = {name for group in flat.groups if not group.divided for name in group.shapes}
        self._kept = [parameter for name, parameter in flat.parameters.items() if name in kept]
        self.zero()

    def zero(self) -> None:
        """Starts a new step. No memory is touched: what stands in the accumulators no longer counts."""
        for parameter in self._flat.parameters.values():
            parameter.main_grad_stale = True  # type: ignore[attr-defined]

    @contextmanager
    def micro_batch(self, *, first: bool) -> Iterator[None]:
        """Around each micro-batch's backward: what ranks divide is summed over them and added to the accumulators.

        Args:
            first: of the step; overwrites what the last step left.
        """
        self._reducer.begin(first=first)
        yield
        self._reducer.finish()

    def replayed(self) -> None:
        """A CUDA graph has made the step: every accumulator counts, though no Python ran that would have noted it."""
        for parameter in self._kept:
            parameter.main_grad_stale = False  # type: ignore[attr-defined]

    @property
    def parts(self) -> Mapping[str, list[torch.Tensor]]:
        """The step's gradients so far, as many of them as this rank accumulates, by parameter; zeros for a parameter
        that had none. See `nmoe.train.flat.FlatGroup.parts`."""
        return self._parts(self.sums)

    def bits(self) -> torch.Tensor:
        """Of each parameter, in order, the bits of what stands in its accumulator, added up as integers: int64, on the
        device. Accumulators that differ have, but for chance, other sums."""
        none = torch.zeros((), dtype=torch.int64, device=self._sums[0].device)
        slices = [
            [piece for part in held for piece in part.view(-1).view(torch.int32).split(_SUMMED_AT_ONCE)]
            for held in self._parts(self._sums).values()
        ]
        return torch.stack([sum((piece.sum(dtype=torch.int64) for piece in pieces), none) for pieces in slices])

    def _parts(self, sums: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        held = {
            name: [part for _, part in group.parts(of_group, name)]
            for group, of_group in zip(self._flat.groups, sums, strict=True)
            for name in group.shapes
        }
        return {name: held[name] for name in self._flat.parameters}

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        """The same, as the shard of each group, in the groups' order."""
        for parameter in self._kept:
            clear_unreached(parameter)
        return self._sums

    def norm(self) -> torch.Tensor:
        """2-norm of what this rank accumulates, a scalar on the device."""
        return self._ops.global_norm(self.sums)

    def _arrived(self, name: str, parameter: torch.Tensor) -> None:
        """Autograd has made the gradient, or an op with a hand-derived backward has written it to main_grad itself."""
        if parameter.grad is not None:
            deliver(parameter, parameter.grad)
            parameter.grad = None
        self._reducer.arrived(name)

    def not_finite(self) -> list[str]:
        """Names of the parameters of whose gradients this rank has a NaN or an infinity."""
        return [
            name for name, parts in self.parts.items() if not all(bool(torch.isfinite(part).all()) for part in parts)
        ]


def clip_factor(norm: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Factor that brings a gradient of this norm under `limit`; 1 where it is under it, or no limit is set."""
    if limit is None:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)
