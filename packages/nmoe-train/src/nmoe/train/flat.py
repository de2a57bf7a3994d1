"""Where parameters lie: those that are updated alike, side by side in one buffer, so that one launch updates them all.

A group has one layout, by which its weights, residuals, gradients and moments are each one contiguous buffer. Every
parameter starts at a multiple of `ALIGNMENT` elements; what lies between is zero in each buffer, and stays so under an
update that takes zero to zero.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

ALIGNMENT = 64
"""Elements: 128 bytes of 16-bit numbers, 256 of 32-bit ones."""

Key = TypeVar("Key", bound=Hashable)


class FlatGroup(Generic[Key]):
    """Parameters of one key and dtype, which become views of `weight`. Equal matrices lie side by side."""

    def __init__(self, key: Key, parameters: Mapping[str, nn.Parameter]) -> None:
        ordered = sorted(parameters.items(), key=lambda item: item[1].shape[-2:])
        first = ordered[0][1]
        self.key, self.dtype = key, first.dtype
        self.shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in ordered}
        self.starts: dict[str, int] = {}
        size = 0
        for name, parameter in ordered:
            self.starts[name] = size
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.weight = torch.zeros(size, dtype=first.dtype, device=first.device)
        for name, parameter in ordered:
            place = self.view(self.weight, name)
            place.copy_(parameter.data)
            parameter.data = place  # frees the parameter's own memory

    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """Another buffer of this layout."""
        return torch.zeros(self.weight.shape, dtype=dtype, device=self.weight.device)

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        """The part of a buffer that belongs to a parameter, in the parameter's shape."""
        shape, start = self.shapes[name], self.starts[name]
        return buffer[start : start + shape.numel()].view(shape)


class FlatParameters(Generic[Key]):
    """All parameters of a model in groups. Making it takes, for a moment, the memory of the largest group once more.

    Args:
        parameters: by name; their values are kept, and their `data` become views.
        key_of: what parameters of one group share, beside their dtype, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], key_of: Callable[[str], Key]) -> None:
        self.parameters = dict(parameters)
        members: dict[tuple[Key, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            members.setdefault((key_of(name), parameter.dtype), {})[name] = parameter
        self.groups = [FlatGroup(key, of_group) for (key, _), of_group in members.items()]

    def views(self, buffers: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of one buffer a group, every parameter's part, by name, in the parameters' order."""
        of_name = {
            name: group.view(buffer, name)
            for group, buffer in zip(self.groups, buffers, strict=True)
            for name in group.shapes
        }
        return {name: of_name[name] for name in self.parameters}
