"""Runs generated Python where it can do no harm: bubblewrap's namespaces, resource limits, and a watch from outside.

Inside there is no network, no home, no environment and no process of others; the root is read-only and holds the
interpreter alone; `/tmp` is its own, of limited size. Resource limits bound each process. Since they do not bound
processes taken together, and the number of processes not at all where the evaluator is root, the evaluator also counts
threads and resident memory of all processes from outside, every few milliseconds, and kills the whole at once: with the
first process of a PID namespace all others in it die.
"""

import json
import os
import secrets
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self

from nmoe.eval.errors import SandboxUnavailableError
from nmoe.eval.syscall_filter import syscall_filter

End = Literal["exit", "wall time", "memory", "processes", "output"]

_POLL_S = 0.01
_BEGUN_S = _GONE_S = 5.0
_CHUNK = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64")
_LAUNCHER = """
import os, resource, sys
names = ("CPU", "AS", "NPROC", "FSIZE", "NOFILE", "CORE")
for name, text in zip(names, sys.argv[1:], strict=True):
    which = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(which)[1]
    limit = int(text)
    if limit >= 0:
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))
os.nice(10)
os.environ.clear()
del sys.argv[1:]
exec(compile(sys.stdin.buffer.read(), "program.py", "exec"), {"__name__": "__main__"})
"""
_PROBE = """
import os, socket
reached = []
if os.environ:
    reached.append("the environment")
if {home!r} != "/" and os.path.isdir({home!r}) and set(os.listdir({home!r})) - {{{on_the_way!r}}}:
    reached.append("the home folder")
for path in ("/", "/dev", "/dev/shm", "/usr", {prefix!r}):
    try:
        open(os.path.join(path, "nmoe-probe"), "w")
        reached.append("a file in " + path)
    except OSError:
        pass
try:
    os.kill({pid}, 0)
    reached.append("the evaluator")
except OSError:
    pass
if [name for _, name in socket.if_nameindex() if name != "lo"]:
    reached.append("the network")
open("/tmp/nmoe-probe", "w").write("x")
print({nonce!r}, ", ".join(reached), sep="")
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 10.0
    cpu_s: int = 5
    """A process's seconds on a CPU."""
    memory_bytes: int = 1 << 30
    """Address space of a process, and resident memory of all together. The kernel may hold as much as `disk_bytes` and
    what is in pipes and sockets besides."""
    processes: int = 32
    """Threads of all processes together."""
    file_bytes: int = 1 << 24
    """Size of a file."""
    disk_bytes: int = 1 << 26
    """Size of `/tmp`, which is memory."""
    open_files: int = 64
    """Of a process."""
    output_bytes: int = 1 << 20
    """Of standard output and error each; a program that prints more is ended."""


@dataclass(frozen=True)
class Execution:
    """How a program ended."""

    end: End
    """`exit`: by itself, or killed by a limit of the kernel's; else by what it used too much of."""
    exit_code: int | None
    """128 + n where signal n ended it; None where the evaluator did."""
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with 0."""
        return self.end == "exit" and self.exit_code == 0


@dataclass(frozen=True)
class Sandbox:
    """Where programs run; `Sandbox.open` makes one. Threads may share it."""

    limits: Limits
    command: tuple[str, ...]
    """What stands before the interpreter's own arguments."""
    seccomp: bytes | None
    """The filter of system calls that bubblewrap puts in force; None: there is no bubblewrap around programs."""

    @classmethod
    def open(cls, limits: Limits | None = None, *, unsafe_exec: bool = False) -> Self:
        """A sandbox that was seen to hold.

        Args:
            limits: what a program may use; None: the defaults.
            unsafe_exec: without bubblewrap: with limits of resources, but with the network, and with every file and
                process of this user within reach. For machines that hold nothing of worth.

        Raises:
            SandboxUnavailableError: there is no bubblewrap, or this machine does not let it work.
        """
        limits = Limits() if limits is None else limits
        interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        if unsafe_exec:
            return cls(limits, (interpreter,), seccomp=None)
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailableError("bubblewrap (bwrap), found none on the PATH")
        sandbox = cls(limits, (*_confinement(bwrap, limits), interpreter), syscall_filter())
        sandbox._probe()
        return sandbox

    @property
    def confined(self) -> bool:
        """Whether bubblewrap is around programs."""
        return self.seccomp is not None

    def run(self, program: str) -> Execution:
        """Runs a Python program, with the standard library, until it ends or has used too much of something. No process
        of it is left then.

        Args:
            program: source, as of a main module; its standard input is empty.
        """
        began = time.monotonic()
        with self._start() as (process, first):
            try:
                with _Streams(process, program.encode(errors="replace"), self.limits.output_bytes) as streams:
                    end = self._watch(process, streams, began + self.limits.wall_s)
            finally:
                _kill(process, first)
        code = None
        if end == "exit":
            code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        stdout, stderr = streams.texts()
        return Execution(end, code, stdout, stderr, time.monotonic() - began)

    @contextmanager
    def _start(self) -> Iterator[tuple[subprocess.Popen[bytes], int | None]]:
        """The process, and a descriptor of its namespace's first one, if it has a namespace."""
        with ExitStack() as held:
            command, folder, given = list(self.command), "/", []
            if self.seccomp is None:
                folder = held.enter_context(tempfile.TemporaryDirectory(prefix="nmoe-", ignore_cleanup_errors=True))
            else:
                rules, to_rules = os.pipe()
                from_info, info = os.pipe()
                for descriptor in (rules, from_info):
                    held.callback(os.close, descriptor)
                given = [rules, info]
                command[1:1] = ["--seccomp", str(rules), "--info-fd", str(info)]
                os.write(to_rules, self.seccomp)  # a pipe holds as much
                os.close(to_rules)
            try:
                process = held.enter_context(
                    subprocess.Popen(
                        [*command, "-I", "-B", "-c", _LAUNCHER, *self._resource_limits()],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        pass_fds=given,
                        cwd=folder,
                        env={},
                        start_new_session=True,
                    )
                )
            finally:
                if self.seccomp is not None:
                    os.close(info)
            first = None
            if self.seccomp is not None and (first := _first_process(from_info)) is not None:
                held.callback(os.close, first)
            yield process, first

    def _resource_limits(self) -> list[str]:
        """As the launcher takes them. Without a namespace of its own the kernel would count all of the user's
        processes: then the watch alone does."""
        limits = self.limits
        processes = limits.processes if self.confined else -1
        values = (limits.cpu_s, limits.memory_bytes, processes, limits.file_bytes, limits.open_files, 0)
        return [str(value) for value in values]

    def _watch(self, process: subprocess.Popen[bytes], streams: "_Streams", deadline: float) -> End:
        looked = 0.0
        while True:
            streams.move(_POLL_S)
            if process.poll() is not None:
                streams.drain()
                return "exit"
            if streams.overflown:
                return "output"
            now = time.monotonic()
            if now >= deadline:
                return "wall time"
            if now - looked >= _POLL_S:
                looked = now
                threads, memory = usage(process.pid)
                # bubblewrap's own two processes have a thread each, and next to no memory.
                if threads > self.limits.processes + (2 if self.confined else 0):
                    return "processes"
                if memory > self.limits.memory_bytes:
                    return "memory"

    def _probe(self) -> None:
        nonce = secrets.token_hex(8)
        home, prefix = os.path.realpath(Path.home()), os.path.realpath(sys.base_prefix)
        # Of the home, nothing may be seen but the folders above an interpreter that stands in it.
        inside = Path(prefix).relative_to(home).parts if Path(prefix).is_relative_to(home) else ()
        on_the_way = inside[0] if inside else ""
        done = self.run(_PROBE.format(home=home, on_the_way=on_the_way, prefix=prefix, pid=os.getpid(), nonce=nonce))
        answer, _, reached = done.stdout.strip().partition(nonce)
        if not done.ok or answer or nonce not in done.stdout:
            said = done.stderr.strip().splitlines()[-1:] or [f"{done.end}, exit code {done.exit_code}"]
            raise SandboxUnavailableError(f"bubblewrap to run a program here, found: {said[0]}")
        if reached:
            raise SandboxUnavailableError(f"bubblewrap to contain a program here; it reached {reached}")


def usage(pid: int) -> tuple[int, int]:
    """Threads, and bytes of resident memory, of a process and all that descend from it."""
    threads = memory = 0
    for each in tree(pid):
        with suppress(OSError):  # it has just ended
            # After the command in parentheses: state, …, the 18th is the number of threads, the 22nd pages (proc(5)).
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            threads, memory = threads + int(fields[17]), memory + int(fields[21]) * _PAGE
    return threads, memory


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it, parents first."""
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        yield each
        with suppress(OSError):
            for task in os.listdir(f"/proc/{each}/task"):
                with suppress(OSError):
                    waiting += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())


def _confinement(bwrap: str, limits: Limits) -> Iterator[str]:
    yield from (bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session")
    yield from ("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL")
    yield from ("--ro-bind", "/usr", "/usr")
    for path in _SYSTEM:
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        elif os.path.isdir(path):
            yield from ("--ro-bind", path, path)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
    prefix = os.path.realpath(sys.base_prefix)
    if not Path(prefix).is_relative_to("/usr"):
        yield from ("--ro-bind", prefix, prefix)
    # What bubblewrap makes itself, devices and the root, would be writable memory without bounds.
    yield from ("--dev", "/dev", "--remount-ro", "/dev")
    yield from ("--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/")


def _first_process(info: int) -> int | None:
    """A descriptor of the first process in the namespace, from what bubblewrap writes of it; None if it makes none, or
    that has ended."""
    written, deadline = b"", time.monotonic() + _BEGUN_S
    while select.select([info], [], [], max(0.0, deadline - time.monotonic()))[0] and (part := os.read(info, _CHUNK)):
        written += part
    try:
        return os.pidfd_open(json.loads(written)["child-pid"])
    except (ValueError, KeyError, ProcessLookupError):
        return None


def _kill(process: subprocess.Popen[bytes], first: int | None) -> None:
    """Ends the process and all that descend from it; returns once they are gone.

    Where they have a namespace, all in it end with `first`, which is gone only after them. Else those are found that
    have not hidden.
    """
    if first is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        select.select([first], [], [], _GONE_S)
    while process.poll() is None:
        found = list(tree(process.pid))
        for pid in [*found[1:], found[0]]:  # children have no parent to be found by once it is gone
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class _Streams:
    """Feeds a process's standard input and keeps what it writes, up to a limit, without ever waiting for it."""

    def __init__(self, process: subprocess.Popen[bytes], program: bytes, limit: int) -> None:
        assert process.stdin is not None, "the process was started with pipes"
        assert process.stdout is not None, "the process was started with pipes"
        assert process.stderr is not None, "the process was started with pipes"
        self._left, self._limit = memoryview(program), limit
        self._stdin: IO[bytes] = process.stdin
        self._kept: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
        self._selector = selectors.DefaultSelector()
        for stream in (self._stdin, *self._kept):
            os.set_blocking(stream.fileno(), False)
        self._selector.register(self._stdin, selectors.EVENT_WRITE)
        for stream in self._kept:
            self._selector.register(stream, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()

    @property
    def overflown(self) -> bool:
        """Whether more was written than is kept."""
        return any(len(kept) > self._limit for kept in self._kept.values())

    def move(self, timeout: float) -> bool:
        """Moves what can be moved within `timeout` seconds; whether anything was."""
        if not self._selector.get_map():
            time.sleep(timeout)
            return False
        ready = self._selector.select(timeout)
        for key, _ in ready:
            stream = key.fileobj
            assert not isinstance(stream, int)
            if stream is self._stdin:
                self._feed()
            else:
                self._keep(stream)  # type: ignore[arg-type]
        return bool(ready)

    def drain(self) -> None:
        """Takes what is left in the pipes of a process that has ended."""
        if not self._stdin.closed:
            self._close_stdin()
        while not self.overflown and self.move(0):
            pass

    def texts(self) -> list[str]:
        """Standard output and error."""
        return [bytes(kept[: self._limit]).decode(errors="replace") for kept in self._kept.values()]

    def _feed(self) -> None:
        try:
            self._left = self._left[os.write(self._stdin.fileno(), self._left[:_CHUNK]) :]
        except BrokenPipeError:
            self._left = self._left[:0]
        if not self._left:
            self._close_stdin()

    def _close_stdin(self) -> None:
        self._selector.unregister(self._stdin)
        with suppress(BrokenPipeError):
            self._stdin.close()

    def _keep(self, stream: IO[bytes]) -> None:
        new = os.read(stream.fileno(), _CHUNK)
        if not new:
            self._selector.unregister(stream)
        elif len(self._kept[stream]) <= self._limit:
            self._kept[stream] += new
