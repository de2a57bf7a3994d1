"""What a step gave, as numbers: in one vector on the device, summed over ranks at once, read by the host later.

The vector holds, one after the other:

    health          the router figures (`nmoe.train.health`)
    losses          of each micro-batch of the global batch its shares of next-token and total loss
    norm            the gradient's, of all ranks
    differing       of the ranks, how many found other bits when they computed the step's gradients again

and of several ranks, where each adds its own to the zeros of the others:

    norms           of each rank what it accumulates
    signals         of each rank the number of the signal that it got, or 0
    faults          of each rank 1 if something went wrong there (`nmoe.rdep.faults`), else 0
    loads           of every router, rows of each expert, which are summed indeed
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World
from nmoe.train.health import health_tags, router_figures


@dataclass(frozen=True)
class StepFigures:
    """What a step gave, all ranks together."""

    losses: tuple[tuple[float, float], ...]
    """Of each micro-batch, in the samples' order, its share of the next-token loss and of the total loss, nats a
    token."""
    grad_norm: float
    health: dict[str, float]
    """See `nmoe.train.health`."""
    signal: int | None = None
    """The number of a signal that a rank has got; one rank alone knows without being told."""
    faulty: tuple[int, ...] = ()
    """Ranks on which something went wrong with the transport."""
    differing: int = 0
    """Ranks whose gradients had other bits when they were computed again."""

    @property
    def loss(self) -> float:
        """Next-token loss of the global batch, nats a token."""
        return sum(next_token for next_token, _ in self.losses)

    @property
    def total_loss(self) -> float:
        """What was differentiated."""
        return sum(total for _, total in self.losses)


class FigureBoard:
    """Where a step's figures stand on the device.

    Args:
        model: whose routers' loads are summed.
        n_micro: micro-batches of a step on each rank.
        world: the ranks.
        healthy: int32 scalar on the device, 0 once something has gone wrong on this rank. One rank alone does not ask.
    """

    def __init__(self, model: Transformer, n_micro: int, world: World, healthy: torch.Tensor) -> None:
        self._model, self._world, self._healthy = model, world, healthy
        self._loads = [router.load for _, router in model.routers()]
        several = world.size if world.size > 1 else 0
        loads = sum(load.numel() for load in self._loads) if several else 0
        sizes = [router_figures(model).numel(), 2 * n_micro * world.size, 1, 1, several, several, several, loads]
        vector = torch.zeros(sum(sizes), device=model.head.weight.device)
        self._health, self._losses, self._norm, self._differing, *of_ranks = vector.split(sizes)
        self._norms, self._signals, self._faults, self._sums = of_ranks
        self._finite = vector[sizes[0] : sizes[0] + sizes[1] + 1]
        self._summed = vector[sizes[0] :]
        self._sizes = sizes[:7]
        self.told = vector[: sum(self._sizes)]
        """What the host reads."""

    def begin(self, signal: int | None) -> None:
        """Starts a step.

        Args:
            signal: the number of the signal that this rank has got.
        """
        if self._world.size == 1:
            return
        self._summed.zero_()
        if signal is not None:
            self._signals[self._world.rank].fill_(signal)

    def put_losses(self, micro_batch: int, loss_2: torch.Tensor) -> None:
        """The losses of this rank's micro-batch of that number."""
        place = 2 * (micro_batch * self._world.size + self._world.rank)
        self._losses[place : place + 2].copy_(loss_2)

    def put_differing(self, differs: torch.Tensor | None) -> None:
        """Whether this rank's gradients had other bits when they were computed again; None: they were not."""
        if differs is None:
            self._differing.zero_()
        else:
            self._differing.copy_(differs)

    def exchange(self, norm: torch.Tensor, ok: torch.Tensor) -> torch.Tensor:
        """Sums over ranks. The routers' loads are then those of all.

        Args:
            norm: of the gradients that this rank accumulates.
            ok: int32 scalar; becomes 0 if a figure is not finite, gradients had other bits the second time, or a rank
                has a fault. The same on all ranks.

        Returns:
            The norm of all ranks' gradients, a scalar on the device.
        """
        if self._world.size > 1:
            self._sum(norm)
            norm = torch.linalg.vector_norm(self._norms)
            ok.mul_(self._faults.sum() == 0)
        self._norm.copy_(norm)
        ok.mul_(torch.isfinite(self._finite).all())
        ok.mul_(self._differing.sum() == 0)
        self._health.copy_(router_figures(self._model).flatten())
        return norm

    def _sum(self, norm: torch.Tensor) -> None:
        rank = self._world.rank
        self._norms[rank].copy_(norm)
        self._faults[rank].copy_(1 - self._healthy)
        if self._loads:
            torch.cat(self._loads, out=self._sums)
        self._world.sum_(self._summed)
        for load, summed in zip(self._loads, self._sums.split([load.numel() for load in self._loads]), strict=True):
            load.copy_(summed)

    def read(self, values: Sequence[float]) -> StepFigures:
        """The figures in `told`, once they are on the host."""
        parts, start = [], 0
        for size in self._sizes:
            parts.append(values[start : start + size])
            start += size
        health, losses, (norm,), (differing,), _, signals, faults = parts
        return StepFigures(
            losses=tuple(zip(losses[::2], losses[1::2], strict=True)),
            grad_norm=norm,
            health=health_tags(self._model, health),
            signal=next((int(number) for number in signals if number), None),
            faulty=tuple(rank for rank, fault in enumerate(faults) if fault),
            differing=int(differing),
        )
