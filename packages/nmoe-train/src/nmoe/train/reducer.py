"""Sums over ranks of the gradients that ranks divide among themselves, while the backward that makes them goes on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from nmoe.rdep.world import World
from nmoe.train.flat import FlatGroup
from torch import nn


@dataclass(eq=False)
class _Chunk:
    """What one collective moves."""

    taken: torch.Tensor
    """A micro-batch's gradients of it: W pieces."""
    sums: torch.Tensor
    """This rank's piece of their sums over ranks and micro-batches."""
    names: frozenset[str]
    """The parameters that it has parts of."""
    missing: set[str] = field(default_factory=set)
    """Those whose gradients the backward has not made yet."""


class Reducer:
    """Adds each micro-batch's gradients, summed over ranks, to accumulators that a rank has of its own pieces alone.

    A chunk is summed as soon as the gradients of its parameters are there, and on a GPU on a stream of its own, beside
    the rest of the backward. All ranks sum their chunks in one order, that in which a backward is likely to make them:
    a chunk waits for those before it, so that ranks never wait for each other in different collectives.

    Args:
        groups: with buffers of a micro-batch's gradients, and shards of their sums.
        parameters: all of the model, in the order in which a forward uses them.
        world: the ranks.
    """

    def __init__(
        self,
        groups: Sequence[tuple[FlatGroup[Any], torch.Tensor, torch.Tensor]],
        parameters: Mapping[str, nn.Parameter],
        world: World,
    ) -> None:
        self._world = world
        self._parameters = {name: parameters[name] for group, _, _ in groups for name in group.shapes}
        position = {name: i for i, name in enumerate(parameters)}
        chunks = [chunk for group, taken, sums in groups for chunk in _chunks(group, taken, sums)]
        # A backward comes last to what the forward used first.
        self._chunks = sorted(chunks, key=lambda chunk: -min(position[name] for name in chunk.names))
        self._of_name: dict[str, list[_Chunk]] = {name: [] for name in self._parameters}
        for chunk in self._chunks:
            for name in chunk.names:
                self._of_name[name].append(chunk)
        # What a later micro-batch's sums lie in until they are added.
        longest = max((chunk.sums.numel() for chunk in chunks), default=0)
        dtypes = {chunk.sums.dtype for chunk in chunks}
        self._piece = {dtype: torch.empty(longest, dtype=dtype, device=world.device) for dtype in dtypes}
        self._beside = torch.cuda.Stream(world.device) if chunks and world.device.type == "cuda" else None
        self._first, self._next = True, len(self._chunks)

    def begin(self, *, first: bool) -> None:
        """Before a micro-batch's backward.

        Args:
            first: of the step; its sums overwrite what the last step left.
        """
        self._first, self._next = first, 0
        for chunk in self._chunks:
            chunk.missing = set(chunk.names)

    def arrived(self, name: str) -> None:
        """The backward has made the gradient of a parameter; outside of `begin` and `finish`, that means nothing."""
        for chunk in self._of_name.get(name, ()):
            chunk.missing.discard(name)
        while self._next < len(self._chunks) and not self._chunks[self._next].missing:
            self._sum_next()

    def finish(self) -> None:
        """After a micro-batch's backward: all of it is in the accumulators, for whatever comes next on this stream."""
        while self._next < len(self._chunks):
            self._sum_next()
        if self._beside is not None:
            torch.cuda.current_stream(self._world.device).wait_stream(self._beside)
        for parameter in self._parameters.values():
            parameter.main_grad_stale = True  # type: ignore[attr-defined]

    def _sum_next(self) -> None:
        chunk = self._chunks[self._next]
        self._next += 1
        for name in chunk.names:  # also of those that arrived: autograd tells of a gradient that is none, too
            clear_unreached(self._parameters[name])
        with self._stream():
            if self._first:
                self._world.scatter_sum(chunk.taken, chunk.sums)
                return
            piece = self._piece[chunk.sums.dtype][: chunk.sums.numel()]
            self._world.scatter_sum(chunk.taken, piece)
            chunk.sums.add_(piece)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        if self._beside is None:
            yield
            return
        self._beside.wait_stream(torch.cuda.current_stream(self._world.device))
        with torch.cuda.stream(self._beside):
            yield


def _chunks(group: FlatGroup[Any], taken: torch.Tensor, sums: torch.Tensor) -> Iterator[_Chunk]:
    layout = group.layout
    for (buffer, piece), chunk in zip(group.chunks(taken), layout.chunks, strict=True):
        stop = chunk.start + layout.ranks * chunk.piece
        names = frozenset(
            name
            for name, shape in group.shapes.items()
            if layout.starts[name] < stop and layout.starts[name] + shape.numel() > chunk.start
        )
        if names:
            yield _Chunk(buffer, sums[piece], names)


def clear_unreached(parameter: nn.Parameter) -> None:
    """Zeros in a parameter's `main_grad`, if no gradient has reached it."""
    if parameter.main_grad_stale:  # type: ignore[attr-defined]
        parameter.main_grad.zero_()  # type: ignore[attr-defined]
        parameter.main_grad_stale = False  # type: ignore[attr-defined]
