"""Symmetric memory and its flags, between processes; what is left behind when they are killed."""

import sys
import time
from pathlib import Path

import pytest
import torch
from nmoe.rdep.errors import SymmetricMemoryError
from nmoe.rdep.shm import SharedMemory, post, wait
from nmoe.rdep.symmetric import SymmetricMemory
from nmoe.rdep.world import alone

SCRIPT = "symmetric_ranks.py"


@pytest.mark.parametrize(
    ("size", "device"),
    [
        (2, "cpu"),
        (4, "cpu"),
        pytest.param(2, "cuda", marks=pytest.mark.multigpu(2)),
        pytest.param(4, "cuda", marks=pytest.mark.multigpu(4)),
        pytest.param(8, "cuda", marks=pytest.mark.multigpu(8)),
    ],
)
def test_every_rank_writes_to_every_rank(ranks, size: int, device: str) -> None:
    """All that is sent arrives, refusals reach all ranks, and on CPUs flags order what they announce."""
    ranks.run_ranks(SCRIPT, size, "all", device)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_leaves_nothing_behind(ranks) -> None:
    with ranks.start_ranks(SCRIPT, 2, "killed", "cpu") as started:
        started.wait(120, until="mapped")
        files = set()
        for process in started.processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            mapped = {line.split()[5] for line in maps if "/dev/shm/nmoe-" in line}
            assert len(mapped) == 2, "its own buffer and the other's"
            files |= mapped
        started.kill()
    assert len(files) == 2
    assert not [file for file in files if Path(file).exists()]


def test_alone_the_memory_is_ones_own() -> None:
    memory: SymmetricMemory = SharedMemory(alone("cpu"))
    (buffer,) = memory.allocate(5)
    assert buffer.tolist() == [0] * 5
    memory.close()
    buffer += 1
    assert buffer.tolist() == [1] * 5, "a buffer lives as long as its last tensor"


LARGEST = 2**31 - 1


@pytest.mark.parametrize(
    ("posted", "awaited", "there"),
    [
        (3, 3, True),
        (4, 3, True),
        (2, 3, False),
        (LARGEST, LARGEST + 1, False),
        (LARGEST + 1, LARGEST, True),
        (LARGEST + 5, LARGEST - 5, True),
        (-1, 0, False),
        (0, -1, True),
        (2**32 + 7, 7, True),
    ],
)
def test_counters_are_compared_across_their_wrap(posted: int, awaited: int, there: bool) -> None:
    words = torch.zeros(3, dtype=torch.int32)
    post(words, 1, posted)
    passed = time.monotonic() - 1
    assert wait(words, 1, awaited, passed) is there, "what is there is seen, however late it is"
    assert [int(words[0]), int(words[2])] == [0, 0]


def test_a_wait_ends_at_its_deadline() -> None:
    words = torch.zeros(1, dtype=torch.int32)
    started = time.monotonic()
    assert not wait(words, 0, 1, started + 0.2)
    assert 0.2 <= time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("words", "index"),
    [
        (torch.zeros(2, dtype=torch.int64), 0),
        (torch.zeros(2, dtype=torch.int32), 2),
        (torch.zeros(2, dtype=torch.int32), -1),
        (torch.zeros(2, 2, dtype=torch.int32)[:, 0], 0),
    ],
)
def test_words_that_are_none_are_refused(words: torch.Tensor, index: int) -> None:
    for call in (lambda: post(words, index, 1), lambda: wait(words, index, 0, 0.0)):
        with pytest.raises(SymmetricMemoryError, match=r"expected .* found .*: view"):
            call()
    assert not words.any()
