"""A process's place among the ranks of a run, as the environment tells it: torchrun's names, which `n` uses too."""

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmoe.cli.errors import EnvironmentNotReadyError, UsageError

if TYPE_CHECKING:
    from nmoe.rdep.world import World

LIFELINE = "NMOE_LIFELINE"
"""Descriptor of a pipe that nothing is written to: it ends when the `n` that started this rank does."""


@dataclass(frozen=True)
class Place:
    """Which rank a process is, and where it meets the others."""

    rank: int
    local_rank: int
    """Number on this host: of the rank's GPU."""
    size: int
    address: str
    port: int
    serves: bool
    """Whether rank 0 holds the ranks' store; otherwise who started the ranks does."""
    lifeline: int | None
    """See `LIFELINE`; None where torchrun or its like started the ranks."""

    @property
    def trusts(self) -> bool:
        """Whether another process, the `n` that started this one or rank 0, checks data and tells what it finds."""
        return self.rank != 0 or self.lifeline is not None

    def join(self, device: str, timeout_s: float) -> "World":
        """Meets the other ranks, on this rank's GPU or on the CPU. See `nmoe.rdep.world.join_world`."""
        from nmoe.rdep.world import join_world

        return join_world(
            rank=self.rank,
            size=self.size,
            address=self.address,
            port=self.port,
            device=f"cuda:{self.local_rank}" if device == "cuda" else device,
            timeout_s=timeout_s,
            serve=self.serves,
        )


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process was started as one of the ranks of a run."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def place_of(environ: Mapping[str, str], world_size: int | None) -> Place | None:
    """This process's place; None where nobody gave it one.

    Args:
        environ: of the process.
        world_size: ranks that the configuration asks for; None: however many there are.

    Raises:
        UsageError: a variable is missing or no number, or the configuration wants another number of ranks.
    """
    if not is_rank(environ):
        return None
    place = Place(
        rank=_number(environ, "RANK"),
        local_rank=_number(environ, "LOCAL_RANK"),
        size=_number(environ, "WORLD_SIZE"),
        address=_text(environ, "MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT"),
        serves=environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        lifeline=_number(environ, LIFELINE) if LIFELINE in environ else None,
    )
    if world_size is not None and place.size != world_size:
        raise UsageError(
            f"expected as many ranks as runtime.world_size, found WORLD_SIZE={place.size} in the environment and "
            f"runtime.world_size = {world_size}: use --set runtime.world_size={place.size}, or start {world_size}; "
            "outside torchrun, unset RANK and WORLD_SIZE"
        )
    return place


def end_with_launcher(lifeline: int) -> None:
    """From now on this process is killed when the `n` that started it is gone, however it went."""

    def wait() -> None:
        os.read(lifeline, 1)  # nothing is ever written: it returns at the pipe's end
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise UsageError(
            f"expected {name} beside RANK and WORLD_SIZE in the environment, found none: start ranks with `n train` "
            "alone or with torchrun, or unset RANK and WORLD_SIZE"
        )
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name)
    if not value.isdecimal():
        raise UsageError(f"expected a number in the environment's {name}, found {value!r}: set it as torchrun does")
    return int(value)


def check_gpus(device: str, wanted: int, asked: str) -> None:
    """Refuses more ranks than this machine has GPUs for; `asked` says where their number is from.

    Raises:
        EnvironmentNotReadyError: a rank would have no GPU of its own.
    """
    import torch

    if device != "cuda" or (found := torch.cuda.device_count()) >= wanted:
        return
    gpus = "a visible GPU" if wanted == 1 else f"{wanted} visible GPUs, one a rank"
    remedy = f"use --gpus {found}, or a machine with more" if found else "`n doctor` says what this machine has"
    raise EnvironmentNotReadyError(f"expected {gpus} ({asked}), found {found}: {remedy}")
