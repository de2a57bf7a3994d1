"""Ranks that save checkpoints together, for test_rank_write.py to kill. Usage: rank_children.py

Each line on standard input, `MODE FOLDER STEP RANKS TIMEOUT`, forks so many ranks that save the steps from STEP on in
FOLDER. `begun PID…` and `ended` frame their lines: `did RANK STEP`, `failed RANK TYPE`, `paused RANK`. Torch is
imported once, for all.
"""

import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from nmoe.model import folder_parts
from nmoe.model.tensor_pieces import TensorPiece
from nmoe.rdep.world import World
from nmoe.train.checkpointer import Checkpointer

SHARE_TIMEOUT_S = 20.0


def say(*words: object) -> None:
    """Writes a line that no kill cuts: in one system call."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def state_of(step: int) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What the ranks save at a step, together."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"t{index}": torch.rand(16, 1024, generator=generator) for index in range(6)}
    return tensors, {"progress": {"step": step}}


def pieces_of(tensors: dict[str, torch.Tensor], rank: int, size: int) -> list[TensorPiece]:
    """A rank's: of even tensors a range of elements, the odd ones in turn whole."""
    pieces = []
    for index, (name, tensor) in enumerate(tensors.items()):
        flat, total = tensor.view(-1), tensor.numel()
        if index % 2:
            first, last = (0, total) if index // 2 % size == rank else (0, 0)
        else:
            first, last = total * rank // size, total * (rank + 1) // size
        pieces.append(TensorPiece(name, tuple(tensor.shape), first, flat[first:last]))
    return pieces


def save_from(folder: Path, step: int, world: World, timeout_s: float, last: int | None) -> None:
    """Saves the steps from `step` on, to the last or without end; says that one is done when the next has begun."""
    checkpointer = Checkpointer(folder, keep=2, keep_every=10, world=world, parts_timeout_s=timeout_s)
    checkpointer.drop_after(step - 1)
    state = {name: torch.empty_like(tensor) for name, tensor in state_of(0)[0].items()}
    while last is None or step <= last:
        tensors, documents = state_of(step)
        for name, tensor in tensors.items():
            state[name].copy_(tensor)  # in place, as an optimizer does it
        checkpointer.save(step, pieces_of(state, world.rank, world.size), documents)
        if checkpointer.failure() is None:
            say("did", world.rank, step - 1)
        step += 1
    checkpointer.wait()


def pause_before_part(rank: int) -> None:
    """Lets this rank write its tensors and stop right before it says so."""

    def pause(*arguments: object) -> None:
        say("paused", rank)
        signal.pause()

    folder_parts._leave_part = pause


def be_rank(mode: str, folder: Path, step: int, rank: int, size: int, port: int, timeout_s: float) -> None:
    store = dist.TCPStore(
        "127.0.0.1", port, None, rank == 0, timedelta(seconds=SHARE_TIMEOUT_S), wait_for_workers=False
    )
    world = World(rank, size, torch.device("cpu"), store, SHARE_TIMEOUT_S)
    if mode == "pause" and rank == 1:
        pause_before_part(rank)
    try:
        save_from(folder, step, world, timeout_s, step if mode == "pause" else None)
    except Exception as error:
        say("failed", rank, type(error).__name__)
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        mode, folder, step, size, timeout = line.split()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(int(size)):
            pids.append(os.fork())
            if pids[-1] == 0:
                be_rank(mode, Path(folder), int(step), rank, int(size), port, float(timeout))
        say("begun", *pids)
        for _ in pids:
            os.wait()  # whichever ends first
        say("ended")


if __name__ == "__main__":
    main()
