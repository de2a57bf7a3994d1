"""Starts the ranks of a run, one process each, and stays with them to the end.

The ranks find one another by the variables that torchrun would set. What rank 0 prints is shown as it comes; what a
rank writes to its standard error is kept, and shown if it was the first to fail.
"""

import codecs
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

from nmoe.cli.errors import ExitCode
from nmoe.cli.place import LIFELINE
from nmoe.cli.rank_log import RankLog
from rich.console import Console

GRACE_S = 3.0
"""From asking a rank to end until it is killed, once another has failed."""
BLAME_S = 2.0
"""How long a rank that fell because of another waits for that other to be seen to fail."""
_POLL_S = 0.05
_STOPPED = frozenset({ExitCode.OK, ExitCode.INTERRUPTED, ExitCode.TERMINATED})
_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, and how."""

    rank: int
    pid: int
    code: int
    """As a shell has it: of a process that a signal killed, 128 and the signal's number."""
    how: str
    """`ended with exit code 4`, `was killed by SIGKILL`, `ended with exit code 6 while rank 2 still ran`."""
    errors: str
    """The last of what it wrote to its standard error."""


@dataclass(frozen=True)
class Ended:
    """How the ranks ended."""

    code: int
    failure: Failure | None
    is_cut_off: bool
    """Whether a signal ended a rank where it could not wait for a step's end."""
    pids: tuple[int, ...]
    others: Mapping[int, str]
    """What the other ranks wrote to their standard error, if it was not empty and there is no log to find it in."""


def run_ranks(
    n_ranks: int, command: Sequence[str], environ: Mapping[str, str], folder: Path | None, console: Console
) -> Ended:
    """Runs `command` as `n_ranks` processes, and returns once all have ended.

    SIGINT and SIGTERM are passed on to every rank. When one fails, the others are ended within seconds. Should this
    process be killed, so are they. Call it from the main thread.

    Args:
        n_ranks: W.
        command: program and arguments, the same for all.
        environ: their environment, but for what tells them their place.
        folder: of the run. Logs go to `logs/rank_<k>.log` in it, from when it holds a `config.toml`. None: nothing is
            kept but what a failure is told with.
        console: shows what rank 0 prints.

    Raises:
        BrokenPipeError: whoever read the output has gone; the ranks ran to their end.
    """
    from torch.distributed import TCPStore

    # Ours, on a port that the system chooses, as torchrun's agent has one; it serves until this function returns.
    store = TCPStore(_ADDRESS, 0, None, True, wait_for_workers=False)
    environ = {
        **environ,
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": _ADDRESS,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with ExitStack() as stack:
        lifeline, held = os.pipe()
        stack.callback(os.close, held)
        try:
            ranks = []
            for rank in range(n_ranks):
                ranks.append(_Rank(rank, n_ranks, command, environ, lifeline))
                stack.callback(ranks[-1].close)
        finally:
            os.close(lifeline)
        supervisor = _Supervisor(ranks, folder, console)
        with _noting_signals(supervisor.received):
            supervisor.run()
        ended = supervisor.ended()
    if supervisor.is_unread:
        raise BrokenPipeError
    return ended


def threads_a_rank(n_ranks: int) -> int:
    """CPU threads that each of `n_ranks` ranks takes of this process's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // n_ranks)


class _Rank:
    """One process, with its output."""

    def __init__(
        self, rank: int, n_ranks: int, command: Sequence[str], environ: Mapping[str, str], lifeline: int
    ) -> None:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), LIFELINE: str(lifeline), "PYTHONFAULTHANDLER": "1"}
        self.rank = rank
        self.process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": str(threads_a_rank(n_ranks)), **environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(lifeline,),
            process_group=0,  # Ctrl-C in a terminal reaches this process alone, which passes it on: once
        )
        self.log = RankLog(f"rank {rank} of {n_ranks}, process {self.process.pid}")

    @property
    def streams(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return self.process.stdout, self.process.stderr

    def send(self, number: int) -> None:
        """Sends a signal, if the process still runs."""
        self.process.send_signal(number)

    def failure(self) -> Failure:
        code = self.process.returncode
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += ", by hand or because memory ran out (the system's log says which)"
        else:
            how = f"ended with exit code {code}"
        errors = self.log.errors.decode(errors="replace")
        return Failure(self.rank, self.process.pid, 128 - code if code < 0 else code, how, errors)

    def close(self) -> None:
        """Ends the process if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in self.streams:
            stream.close()
        self.log.close()


class _Supervisor:
    """Reads what ranks say, passes signals on, and ends all when one fails."""

    def __init__(self, ranks: Sequence[_Rank], folder: Path | None, console: Console) -> None:
        self.ranks, self.folder, self.console = ranks, folder, console
        self.received: list[int] = []
        """Signals to be passed on; grows by what a handler notes."""
        self.is_unread = False
        self._stopping: int | None = None
        self._is_cut_off = False
        """Whether a rank died of a signal that was passed on, where it could not wait for a step's end."""
        self._failed: list[_Rank] = []
        """In the order in which they were seen to have ended."""
        self._first: _Rank | None = None
        self._stuck: list[int] = []
        """Who still ran when a rank that had waited in vain was taken for the first to fail."""
        self._failed_s = self._ending_s = float("inf")
        self._killed = False
        self._decoder = codecs.getincrementaldecoder(console.encoding)(errors="replace")
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Returns once every rank has ended and all that it said is read."""
        with self._selector:
            for rank in self.ranks:
                for stream in rank.streams:
                    os.set_blocking(stream.fileno(), False)
                    self._selector.register(stream, selectors.EVENT_READ, rank)
            while any(rank.process.poll() is None for rank in self.ranks):
                self._read(_POLL_S)
                self._pass_on()
                self._watch(time.monotonic())
            self._watch(time.monotonic())
            # What is still in the pipes; not to their ends, which a process that a rank left behind may hold open.
            while self._read(0.0):
                pass
            self._show("", final=True)

    def ended(self) -> Ended:
        """How the ranks ended."""
        pids = tuple(rank.process.pid for rank in self.ranks)
        if self._first is not None:
            failure = self._first.failure()
            if self._stuck:
                who = f"rank {self._stuck[0]}" if len(self._stuck) == 1 else f"ranks {', '.join(map(str, self._stuck))}"
                failure = replace(failure, how=f"{failure.how} while {who} still ran")
            kept = {
                rank.rank: rank.log.errors.decode(errors="replace")
                for rank in self.ranks
                if rank is not self._first and rank.log.path is None and rank.log.errors
            }
            return Ended(failure.code, failure, False, pids, kept)
        if self._is_cut_off:
            assert self._stopping is not None, "a signal that was passed on cut it off"
            return Ended(128 + self._stopping, None, True, pids, {})
        return Ended(max(rank.process.returncode for rank in self.ranks), None, False, pids, {})

    def _read(self, wait_s: float) -> bool:
        """Takes what there is; whether there was something."""
        self._place_logs()
        found = False
        for key, _ in self._selector.select(wait_s):
            rank, stream = key.data, key.fileobj
            chunk = os.read(key.fd, 1 << 16)
            if not chunk:
                self._selector.unregister(stream)
                continue
            found = True
            is_error = stream is rank.process.stderr
            rank.log.write(chunk, is_error=is_error)
            if rank.rank == 0 and not is_error:
                self._show(self._decoder.decode(chunk))
        return found

    def _place_logs(self) -> None:
        folder = self.folder
        if folder is not None and self.ranks[0].log.path is None and (folder / "config.toml").is_file():
            for rank in self.ranks:
                rank.log.move_to(folder / "logs" / f"rank_{rank.rank}.log")

    def _show(self, text: str, *, final: bool = False) -> None:
        if final:
            text += self._decoder.decode(b"", final=True)
        if not text or self.is_unread:
            return
        try:
            self.console.file.write(text)
            self.console.file.flush()
        except BrokenPipeError:
            self.is_unread = True  # as a run of one rank does: it goes on

    def _pass_on(self) -> None:
        while self.received:
            self._stopping = self.received.pop(0)
            for rank in self.ranks:
                rank.send(self._stopping)

    def _watch(self, now: float) -> None:
        """Sees who has ended, finds out who failed first, and ends the others."""
        for rank in self.ranks:
            code = rank.process.poll()
            if code is None or code in _STOPPED or rank in self._failed:
                continue
            if self._stopping is not None and code == -self._stopping:
                self._is_cut_off = True
            elif self._ending_s == float("inf"):
                self._failed.append(rank)
                self._failed_s = min(self._failed_s, now)
        if self._first is None and self._failed:
            own = [rank for rank in self._failed if rank.process.returncode != ExitCode.PEER]
            ended = all(rank.process.returncode is not None for rank in self.ranks)
            if own:
                self._first = own[0]
            elif not self._is_cut_off and (ended or now - self._failed_s >= BLAME_S):
                self._first = self._failed[0]
                self._stuck = [rank.rank for rank in self.ranks if rank.process.returncode is None]
        if (self._first is not None or self._is_cut_off) and self._ending_s == float("inf"):
            self._ending_s = now
            self._send_all(signal.SIGTERM)
        if now - self._ending_s >= GRACE_S and not self._killed:
            self._killed = True
            self._send_all(signal.SIGKILL)

    def _send_all(self, number: int) -> None:
        for rank in self.ranks:
            rank.send(number)


@contextmanager
def _noting_signals(received: list[int]) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
