"""How the memory that the ranks share is laid out: slabs, returns and flags.

Shapes: W ranks, N most tokens of a rank, D width, K experts per token.
"""

from math import prod

import torch
from nmoe.kernels.reference.exchange import WAVES, Returns, Slab
from nmoe.rdep.symmetric import SymmetricMemory

_ALIGNMENT = 256

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor."""


def allocate_slab(
    memory: SymmetricMemory, rank: int, world: int, most_tokens: int, dim: int, top_k: int, dtype: torch.dtype
) -> Slab:
    """Room for every rank's tokens, on every rank, with their experts and gates."""
    x, expert, gate, end = _allocate(memory, *_slab_parts(world, most_tokens, dim, top_k, dtype))
    return Slab(x, expert, gate, end, torch.zeros(1, dtype=torch.int32, device=x[rank].device))


def allocate_returns(
    memory: SymmetricMemory, world: int, most_tokens: int, dim: int, top_k: int, dtype: torch.dtype
) -> Returns:
    """Room for what every owner returns of a rank's tokens, on every rank."""
    y, dgate = _allocate(memory, ((world, most_tokens, dim), dtype), ((world, most_tokens, top_k), torch.float32))
    return Returns(y, dgate)


def allocate_words(memory: SymmetricMemory, count: int) -> tuple[torch.Tensor, ...]:
    """int32 (count,) of each rank, zero."""
    return _allocate(memory, ((count,), torch.int32))[0]


def slab_bytes(world: int, most_tokens: int, dim: int, top_k: int, dtype: torch.dtype) -> int:
    """What a slab takes on each rank."""
    return sum(_room(part) for part in _slab_parts(world, most_tokens, dim, top_k, dtype))


def _slab_parts(world: int, most_tokens: int, dim: int, top_k: int, dtype: torch.dtype) -> tuple[Part, ...]:
    """Tokens, their experts, their gates, and how many each rank sends up to the end of each wave."""
    return (
        ((world, most_tokens, dim), dtype),
        ((world, most_tokens, top_k), torch.int32),
        ((world, most_tokens, top_k), torch.float32),
        ((WAVES, world), torch.int32),
    )


def _room(part: Part) -> int:
    """Bytes, up to where the next part may start."""
    shape, dtype = part
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _allocate(memory: SymmetricMemory, *parts: Part) -> list[tuple[torch.Tensor, ...]]:
    """One allocation for all parts; of each part, a tensor a rank."""
    sizes = [_room(part) for part in parts]
    buffers = memory.allocate(sum(sizes))
    found, start = [], 0
    for (shape, dtype), size in zip(parts, sizes, strict=True):
        count = prod(shape) * dtype.itemsize
        found.append(tuple(buffer[start : start + count].view(dtype).view(shape) for buffer in buffers))
        start += size
    return found
