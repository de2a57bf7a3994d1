"""Memory of the same size on every rank, which every rank can write to."""

from collections.abc import Callable
from typing import Protocol

import torch
from nmoe.rdep.errors import SymmetricMemoryError
from nmoe.rdep.world import World


class SymmetricMemory(Protocol):
    """Allocates buffers that all ranks of a world map. Every rank calls the same, in the same order."""

    allocated: int
    """Bytes of this rank's own buffers."""

    def allocate(self, nbytes: int) -> tuple[torch.Tensor, ...]:
        """Every rank's buffer, by rank: uint8 (nbytes,), zero, 256-byte aligned. `[rank]` is this rank's own.

        All ranks have mapped all buffers when this returns on any.

        Raises:
            SymmetricMemoryError: on all ranks, if the sizes differ or a rank cannot have the memory.
            PeerTimeoutError: a rank did not call.
        """
        ...

    def close(self) -> None:
        """Gives the buffers back; no tensor of them may be used any more. Does nothing the second time."""
        ...


def agree_on_size(world: World, nbytes: int) -> None:
    """Every rank asks for the same number of bytes, at least 1.

    Raises:
        SymmetricMemoryError: on all ranks, if they do not.
    """
    sizes = [int(value) for value in world.share("symmetric size", str(nbytes).encode())]
    if min(sizes) < 1 or len(set(sizes)) > 1:
        told = ", ".join(f"{size} on rank {rank}" for rank, size in enumerate(sizes))
        raise SymmetricMemoryError(
            f"expected every rank to ask for the same number of bytes, at least 1, found {told}: give all ranks the "
            "same model, batch and [rdep]"
        )


def all_or_none(world: World, name: str, make: Callable[[], bytes]) -> list[bytes]:
    """What `make` gives on every rank, by rank: where it fails on one, all fail at once, and none waits in vain.

    Raises:
        SymmetricMemoryError: on all ranks, that of the lowest rank on which `make` raised one.
    """
    try:
        answer = b"+" + make()
    except SymmetricMemoryError as error:
        answer = b"-" + str(error).encode()
    answers = world.share(name, answer)
    for rank, told in enumerate(answers):
        if told.startswith(b"-"):
            raise SymmetricMemoryError(f"rank {rank}: {told[1:].decode()}")
    return [told[1:] for told in answers]
