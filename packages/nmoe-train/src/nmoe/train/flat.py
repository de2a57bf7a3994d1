"""Parameters that are updated alike, side by side in one buffer, so that one launch updates them all.

A group has one layout (`nmoe.train.layout`), by which its weights and a micro-batch's gradients are each one contiguous
buffer; residuals, accumulated gradients and moments, which a rank has of its own pieces alone, are shards. What lies
between parameters is zero everywhere, and stays so under an update that takes zero to zero.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from nmoe.rdep.world import World
from nmoe.train.layout import Layout, Shape, Span
from torch import nn

Key = TypeVar("Key", bound=Hashable)


class FlatGroup(Generic[Key]):
    """Parameters of one key and dtype, which become views of `weight`."""

    def __init__(
        self,
        key: Key,
        parameters: Mapping[str, nn.Parameter],
        lay_out: Callable[[Key, Mapping[str, Shape]], Layout],
        world: World,
    ) -> None:
        first = next(iter(parameters.values()))
        self.key, self.dtype, self.world = key, first.dtype, world
        self.layout = lay_out(key, {name: parameter.shape for name, parameter in parameters.items()})
        by_place = sorted(parameters, key=self.layout.starts.__getitem__)
        self.shapes: dict[str, torch.Size] = {name: parameters[name].shape for name in by_place}
        self.weight = torch.zeros(self.layout.size, dtype=first.dtype, device=first.device)
        for name in by_place:
            place = self.view(self.weight, name)
            place.copy_(parameters[name].data)
            parameters[name].data = place  # frees the parameter's own memory

    @property
    def divided(self) -> bool:
        """Whether several ranks hold the parameters, and each updates its pieces of them."""
        return self.layout.ranks > 1

    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """Another buffer of this layout."""
        return torch.zeros(self.layout.size, dtype=dtype, device=self.weight.device)

    def shard_zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """A shard: this rank's part of another buffer."""
        return torch.zeros(self.layout.shard_size, dtype=dtype, device=self.weight.device)

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a buffer that belongs to a parameter, in the parameter's shape."""
        shape, start = self.shapes[name], self.layout.starts[name]
        return buffer[start : start + shape.numel()].view(shape)

    def parts(self, shard: torch.Tensor, name: str) -> list[tuple[int, torch.Tensor]]:
        """What a shard has of a parameter: first element in the parameter, and the elements from there on; in the
        parameter's shape where that is all of it."""
        shape = self.shapes[name]
        spans = list(self.layout.parts(name, shape.numel()))
        parts = [(span.start, shard[span.at : span.at + span.size]) for span in spans]
        return [(0, part.view(shape)) if part.numel() == shape.numel() else (first, part) for first, part in parts]

    def chunks(self, buffer: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice]]:
        """What each collective moves of a buffer, and where this rank's piece of it lies in a shard."""
        at = 0
        for chunk in self.layout.chunks:
            yield buffer[chunk.start : chunk.start + self.layout.ranks * chunk.piece], slice(at, at + chunk.piece)
            at += chunk.piece

    def gather_weights(self) -> None:
        """After an update: every rank's pieces of the weights go to all that divide them."""
        if self.divided:
            for chunk, _ in self.chunks(self.weight):
                self.world.gather_(chunk)


class FlatParameters(Generic[Key]):
    """All parameters of a model in groups. Making it takes, for a moment, the memory of the largest group once more.

    Args:
        parameters: by name; their values are kept, and their `data` become views.
        key_of: what parameters of one group share, beside their dtype, by name.
        lay_out: places the parameters of a key.
        world: whose ranks divide what a layout divides.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        key_of: Callable[[str], Key],
        lay_out: Callable[[Key, Mapping[str, Shape]], Layout],
        world: World,
    ) -> None:
        self.parameters, self.world = dict(parameters), world
        members: dict[tuple[Key, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            members.setdefault((key_of(name), parameter.dtype), {})[name] = parameter
        self.groups = [FlatGroup(key, of_group, lay_out, world) for (key, _), of_group in members.items()]
        self._group_of = {name: group for group in self.groups for name in group.shapes}

    def parts(self, name: str) -> list[Span]:
        """What this rank updates of a parameter."""
        group = self._group_of[name]
        return list(group.layout.parts(name, group.shapes[name].numel()))
