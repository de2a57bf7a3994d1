"""Symmetric memory and flags for ranks on CPUs of one host: files in memory that every rank maps."""

import ctypes
import errno
import mmap
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch
from nmoe.rdep.errors import SymmetricMemoryError
from nmoe.rdep.symmetric import agree_on_size, all_or_none
from nmoe.rdep.world import World

_SHM = Path("/dev/shm")
_SPINS = 100
_SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 1e-3
_ORDER = threading.Lock()


class SharedMemory:
    """`SymmetricMemory` in POSIX shared memory. A file has a name only until all ranks have mapped it.

    Args:
        world: the ranks, all on one host.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # What Linux's shm_open uses; a Mac has no such folder, and maps a plain file just as well.
        self._folder = _SHM if _SHM.is_dir() else Path(tempfile.gettempdir())
        self._closed = False
        self.allocated = 0

    def allocate(self, nbytes: int) -> tuple[torch.Tensor, ...]:
        """See `SymmetricMemory.allocate`."""
        if self._closed:
            raise SymmetricMemoryError("expected open shared memory, found it closed: allocate before `close`")
        world = self._world
        agree_on_size(world, nbytes)
        own = self._folder / f"nmoe-{uuid.uuid4().hex}"
        buffers: list[torch.Tensor] = []

        def create() -> bytes:
            self._create(own, nbytes)
            return own.name.encode()

        def map_all() -> bytes:
            buffers.extend(_map(self._folder / os.fsdecode(name), nbytes) for name in names)
            return b""

        try:
            names = all_or_none(world, "shared memory's names", create)
            all_or_none(world, "shared memory's mappings", map_all)
        finally:
            own.unlink(missing_ok=True)
        self.allocated += nbytes
        return tuple(buffers)

    def close(self) -> None:
        """See `SymmetricMemory.close`. A buffer goes when its last tensor on its last rank goes."""
        self._closed = True

    def _create(self, path: Path, nbytes: int) -> None:
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                # Takes the memory now: a folder that is too small would else end a rank by SIGBUS, much later.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file, 0, nbytes)
                else:
                    os.ftruncate(file, nbytes)
            finally:
                os.close(file)
        except OSError as error:
            path.unlink(missing_ok=True)
            free = os.statvfs(self._folder)
            found = f"{free.f_bavail * free.f_frsize} free"
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                found = f"{error.strerror} ({found})"
            raise SymmetricMemoryError(
                f"expected room for {nbytes} bytes of each rank in {self._folder}, found {found}: enlarge it (mount -o "
                "remount,size=…; docker run --shm-size=…), or lower train.micro_batch_size or train.seq_len"
            ) from error


def _map(path: Path, nbytes: int) -> torch.Tensor:
    try:
        file = os.open(path, os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(file, nbytes), dtype=torch.uint8)  # pages: aligned to 4096 bytes or more
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise SymmetricMemoryError(
            f"expected to map {nbytes} bytes of {path}, found {error}: run all ranks on one host, in one container and "
            "as one user"
        ) from error


def post(words: torch.Tensor, index: int, value: int) -> None:
    """Stores a word that another rank waits for, after everything that this thread has written before.

    Args:
        words: int32 (n,), contiguous, in symmetric memory.
        index: which.
        value: wraps to 32 bits.
    """
    _fence()
    _word(words, index).value = value


def wait(words: torch.Tensor, index: int, at_least: int, deadline_s: float) -> bool:
    """Waits for a counter that another rank posts; what that rank wrote before is then there to be read.

    Args:
        words: int32 (n,), contiguous, in symmetric memory.
        index: which.
        at_least: what the counter has to reach. Counters may wrap: they are compared by their difference as int32.
        deadline_s: when to give up, as `time.monotonic()` tells it. A counter that is there already is always seen.

    Returns:
        False: the deadline passed.
    """
    word = _word(words, index)
    spins, sleep_s = _SPINS, _SHORTEST_SLEEP_S
    while ctypes.c_int32(word.value - at_least).value < 0:
        if time.monotonic() >= deadline_s:
            return False
        # Most waits are short. Ranks may share a core with the one they wait for: even a spin gives it away.
        time.sleep(0 if spins > 0 else sleep_s)
        if spins > 0:
            spins -= 1
        else:
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
    _fence()
    return True


def _word(words: torch.Tensor, index: int) -> ctypes.c_int32:
    """The word itself: ctypes reads and stores it by one aligned access, which a tensor's kernels do not promise."""
    if words.dtype != torch.int32 or not words.is_contiguous() or not 0 <= index < words.numel():
        raise SymmetricMemoryError(
            f"expected contiguous int32 words and an index below their number, found {words.numel()} {words.dtype}, "
            f"strides {words.stride()}, index {index}: view the buffer as int32"
        )
    return ctypes.c_int32.from_address(words.data_ptr() + 4 * index)


def _fence() -> None:
    """Orders all memory accesses of this thread before the call ahead of all after it.

    x86 keeps the order of stores and that of loads, but ARM, as in a Mac, does not, and Python has no fence. A lock
    has: its release comes after all that stands before it, and its acquisition before all that stands behind it. Once
    through a lock is not enough, as accesses may slip in from both sides and pass one another inside; what stands
    before the first release cannot pass what stands behind the second acquisition.
    """
    with _ORDER:
        pass
    with _ORDER:
        pass
