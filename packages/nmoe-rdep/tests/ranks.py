"""Ranks of a world as processes of their own: started by a test (`run_ranks`), joined by the script of each (`join`).

Test modules get this module as the fixture `ranks`; a rank's script, which lies beside it, imports it.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOLDER = Path(__file__).parent


class RankFailedError(AssertionError):
    """A rank ended with an error, or did not end; the message holds what it said."""


class Ranks:
    """Processes that run, with what they have said so far."""

    def __init__(self, script: str | Path, size: int, args: tuple[Any, ...], folder: Path) -> None:
        self._folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, str(FOLDER / script), *map(str, args)]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in range(size):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with open(folder / f"{rank}.out", "wb") as out, open(folder / f"{rank}.err", "wb") as err:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))

    def said(self, rank: int, stream: str = "out") -> str:
        return (self._folder / f"{rank}.{stream}").read_text(errors="replace")

    def wait(self, timeout_s: float, until: str | None = None) -> None:
        """Until every rank has ended well, or said a line that holds `until`.

        Raises:
            RankFailedError: with the words of the first that failed, or of all if they are too late.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            codes = [process.poll() for process in self.processes]
            for rank, code in enumerate(codes):
                if code:
                    raise RankFailedError(f"rank {rank} ended with {code}:\n{self.said(rank, 'err')}{self.said(rank)}")
            if all(code == 0 or (until and until in self.said(rank)) for rank, code in enumerate(codes)):
                return
            if time.monotonic() > deadline:
                told = "\n".join(
                    f"rank {rank} ({'running' if code is None else code}): {self.said(rank, 'err')}{self.said(rank)}"
                    for rank, code in enumerate(codes)
                )
                raise RankFailedError(f"not all ranks were done within {timeout_s:g} s:\n{told}")
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@contextmanager
def start_ranks(script: str | Path, size: int, *args: Any) -> Iterator[Ranks]:
    """Starts `size` processes of a script in this folder; kills at the end those that still run."""
    with TemporaryDirectory() as folder:
        ranks = Ranks(script, size, args, Path(folder))
        try:
            yield ranks
        finally:
            ranks.kill()


def run_ranks(script: str | Path, size: int, *args: Any, timeout_s: float = 120.0) -> list[str]:
    """Runs `size` processes of a script to their end; what each has written to its standard output, by rank.

    Raises:
        RankFailedError: a rank failed, and then the others are killed at once; or `timeout_s` passed.
    """
    with start_ranks(script, size, *args) as ranks:
        ranks.wait(timeout_s)
        return [ranks.said(rank) for rank in range(size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(device: str, timeout_s: float = 60.0) -> Any:
    """In a rank's script: its `World`, from the environment. `device`: "cpu" or "cuda", of which each rank has one."""
    from nmoe.rdep.world import join_world

    return join_world(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        address=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
        device=f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device,
        timeout_s=timeout_s,
    )
