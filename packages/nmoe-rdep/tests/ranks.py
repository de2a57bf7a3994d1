"""Ranks of a world as processes of their own: started by a test (`run_ranks`), joined by the script of each (`join`).

Test modules get this module as the fixture `ranks`; a rank's script, which lies beside it, imports it. As a program it
forks ranks on CPUs, which have their imports from it: ranks.py FOLDER SIZE SCRIPT ARGUMENT…
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        common = environment_of(size)
        for rank in range(size):
            environment = common | place_of(rank)
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
    """Runs `size` ranks of a script to their end; what each has written to its standard output, by rank.

    Raises:
        RankFailedError: a rank failed, and then the others are killed at once; or `timeout_s` passed.
    """
    if "cuda" in args:
        with start_ranks(script, size, *args) as ranks:
            ranks.wait(timeout_s)
            return [ranks.said(rank) for rank in range(size)]
    with TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, str(size), str(FOLDER / script), *map(str, args)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=environment_of(size), text=True, start_new_session=True, **streams)
        try:
            told, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            told = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(Path(folder).iterdir()))
            raise RankFailedError(f"not all ranks were done within {timeout_s:g} s:\n{told}") from None
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            raise RankFailedError(told)
        return [(Path(folder) / f"{rank}.out").read_text() for rank in range(size)]


def fork_ranks(folder: Path, size: int, script: str, args: list[str]) -> None:
    """Ends with the words of the first rank that fails; the caller kills the others."""
    sys.argv = [script, *args]
    main = runpy.run_path(script)["main"]
    ranks = {fork_rank(rank, folder, main): rank for rank in range(size)}
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status:
            told = "".join((folder / f"{rank}.{stream}").read_text() for stream in ("err", "out"))
            sys.exit(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}:\n{told}")


def fork_rank(rank: int, folder: Path, main: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(place_of(rank))
        for number, stream in ((1, "out"), (2, "err")):
            with (folder / f"{rank}.{stream}").open("wb") as file:
                os.dup2(file.fileno(), number)
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def environment_of(size: int) -> dict[str, str]:
    """What all ranks of a world have in common."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return os.environ | place | {"OMP_NUM_THREADS": "1"}


def place_of(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


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


if __name__ == "__main__":
    fork_ranks(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
