"""Checkpoints of several ranks: of one moment and of all ranks, or none; a failure reaches every rank."""

import errno
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from nmoe.model import folder_place
from nmoe.model.errors import CheckpointError, DiskSpaceError, InvalidEntryError
from nmoe.model.folder_parts import NotPublishedError, PartFailedError
from nmoe.model.tensor_pieces import TensorPiece, whole_pieces
from nmoe.train import rank_write
from nmoe.train.checkpointer import Checkpointer, list_complete, load, newest_complete, step_of
from nmoe.train.errors import CheckpointWriteError

CHILDREN = Path(__file__).with_name("rank_children.py")
SCRIPT = runpy.run_path(str(CHILDREN))
state_of, pieces_of = SCRIPT["state_of"], SCRIPT["pieces_of"]


class ThreadWorld:
    """A rank that is a thread: what a checkpointer needs of a World."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shared: dict[str, dict[int, bytes]]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._shared = barrier, shared

    def share(self, name: str, value: bytes, timeout_s: float | None = None) -> list[bytes]:
        values = self._shared.setdefault(name, {})
        assert self.rank not in values, "shared twice"
        values[self.rank] = value
        self._barrier.wait(30)
        return [values[rank] for rank in range(self.size)]


def on_ranks(size: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns on every rank, or the exception that it raises."""
    barrier, shared = threading.Barrier(size), {}
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, size, barrier, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


def raised(error: Exception | None) -> Exception | None:
    if isinstance(error, Exception):
        raise error
    return error


def save_on_ranks(folder: Path, size: int, steps, **options: Any) -> None:
    def work(world: ThreadWorld) -> None:
        checkpointer = Checkpointer(folder, **{"keep": 100, **options}, world=world)
        for step in steps:
            tensors, documents = state_of(step)
            checkpointer.save(step, pieces_of(tensors, world.rank, size), documents)
            for tensor in tensors.values():
                tensor.fill_(-1.0)  # the state changes while the write may not even have begun
        checkpointer.wait()

    assert list(map(raised, on_ranks(size, work))) == [None] * size


def assert_holds(path: Path, step: int) -> None:
    folder = load(path)
    tensors, documents = state_of(step)
    assert folder.document("progress") == documents["progress"]
    assert set(folder.names) == set(tensors)
    for name, tensor in folder.tensors().items():
        assert torch.equal(tensor, tensors[name])


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_complete(folder)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_save_what_one_would(tmp_path, size):
    save_on_ranks(tmp_path, size, [3, 20, 21], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000021"]
    for step in (20, 21):
        assert_holds(tmp_path / f"step_{step:08}", step)


def test_one_rank_with_pieces_writes_the_bytes_of_whole_tensors(tmp_path):
    tensors, documents = state_of(5)
    save_on_ranks(tmp_path / "pieces", 1, [5])
    checkpointer = Checkpointer(tmp_path / "whole", keep=1)
    checkpointer.save(5, tensors, documents)
    checkpointer.wait()
    found = [
        {file.name: file.read_bytes() for file in (tmp_path / kind / "step_00000005").iterdir()}
        for kind in ("pieces", "whole")
    ]
    assert found[0] == found[1]
    flat = tensors["t0"].view(-1)
    with pytest.raises(InvalidEntryError, match=r"'t0'.*nowhere"):
        checkpointer.save(6, [TensorPiece("t0", (16, 1024), 0, flat[:7])], documents)


def test_host_memory_is_reused_by_every_rank(tmp_path):
    def work(world: ThreadWorld) -> list[dict[str, int]]:
        checkpointer = Checkpointer(tmp_path, keep=1, world=world)
        seen = []
        for step in (1, 2):
            tensors, documents = state_of(step)
            checkpointer.save(step, pieces_of(tensors, world.rank, 2), documents)
            seen.append({name: tensor.data_ptr() for name, tensor in checkpointer._snapshot.items()})
        checkpointer.wait()
        return seen

    for seen in on_ranks(2, work):
        assert seen[0] == seen[1] != {}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_ranks_failed_write_reaches_all_and_the_next_save_makes_it_good(tmp_path, monkeypatch, failing):
    save_on_ranks(tmp_path, 3, [1])
    write_part = rank_write.write_part

    def broken(temporary: Path, path: Path, rank: int, *arguments: Any) -> None:
        if rank == failing and step_of(path) == 2:
            raise OSError(errno.EIO, "bad block")
        write_part(temporary, path, rank, *arguments)

    monkeypatch.setattr(rank_write, "write_part", broken)

    def work(world: ThreadWorld) -> tuple[Exception | None, Exception | None, list[int]]:
        checkpointer = Checkpointer(tmp_path, keep=2, world=world)
        for step in (2, 3):
            tensors, documents = state_of(step)
            checkpointer.save(step, pieces_of(tensors, world.rank, 3), documents)
            if step == 2:
                checkpointer._join()
                world._barrier.wait(30)
                steps = steps_in(tmp_path)
                world._barrier.wait(30)
        checkpointer.wait()
        return checkpointer.failure(), checkpointer.failure(), steps

    for rank, (first, second, steps) in enumerate(map(raised, on_ranks(3, work))):
        assert "bad block" in str(first)
        of_others = NotPublishedError if rank else PartFailedError
        assert isinstance(first, CheckpointWriteError if rank == failing else of_others)
        assert second is None, "told once"
        assert steps == [1], "nothing of it was taken for a checkpoint"
    assert steps_in(tmp_path) == [1, 3]
    assert not list(tmp_path.glob(".*"))
    assert_holds(tmp_path / "step_00000003", 3)


def test_wait_raises_on_every_rank_what_failed_last(tmp_path, monkeypatch):
    def broken(*arguments: Any) -> None:
        raise OSError(errno.EIO, "bad block")

    monkeypatch.setattr(rank_write, "write_part", broken)

    def work(world: ThreadWorld) -> None:
        checkpointer = Checkpointer(tmp_path, keep=2, world=world)
        checkpointer.save(2, whole_pieces({f"t{world.rank}": torch.ones(2)}), {})
        checkpointer.wait()

    assert all("bad block" in str(error) for error in on_ranks(2, work))


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_what_one_rank_cannot_save_is_refused_on_all_before_anything_is_written(tmp_path, monkeypatch):
    save_on_ranks(tmp_path, 2, [1])

    def work(world: ThreadWorld) -> list[Exception]:
        checkpointer = Checkpointer(tmp_path, keep=2, world=world)
        refusals = []
        big = whole_pieces({f"t{world.rank}": torch.ones(1 << 19)})
        for case in ("document", "dtype", "disk"):
            if case == "disk":
                world._barrier.wait(30)
                # Room for each of the two parts, not for both.
                monkeypatch.setattr(folder_place.shutil, "disk_usage", lambda path: Usage(0, 0, 3 << 20))
            odd = world.rank == 1 and case == "dtype"
            pieces = whole_pieces({"c": torch.zeros(2, dtype=torch.complex64)}) if odd else big
            bad = world.rank == 0 and case == "document"
            try:
                checkpointer.save(2, pieces, {"d": float("nan")} if bad else {})
            except CheckpointError as error:
                refusals.append(error)
        checkpointer.wait()
        return refusals

    of_rank = on_ranks(2, work)
    assert [type(error) for error in of_rank[0]] == [InvalidEntryError, PartFailedError, DiskSpaceError]
    assert [type(error) for error in of_rank[1]] == [PartFailedError, InvalidEntryError, PartFailedError]
    assert "'c'" in str(of_rank[0][1])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_pieces_that_leave_a_gap_over_all_ranks_make_no_checkpoint(tmp_path):
    def work(world: ThreadWorld) -> None:
        checkpointer = Checkpointer(tmp_path, keep=2, world=world)
        flat = torch.arange(10)
        checkpointer.save(2, [TensorPiece("gone", (10,), 6 * world.rank, flat[:4])], {})
        checkpointer.wait()

    for error in on_ranks(2, work):
        assert "'gone'" in str(error)
        assert "elements 4 to 5 nowhere" in str(error)
    assert list_complete(tmp_path) == []


def test_only_rank_0_removes(tmp_path, monkeypatch):
    pruned = []
    prune = Checkpointer._prune
    monkeypatch.setattr(Checkpointer, "_prune", lambda self: (pruned.append(self._world.rank), prune(self)))
    save_on_ranks(tmp_path, 2, [10, 20, 30])
    assert pruned == [0, 0, 0]
    (tmp_path / ".step_00000040.tmp-1").mkdir()

    def work(world: ThreadWorld) -> None:
        if world.rank == 1:
            Checkpointer(tmp_path, keep=1, world=world).drop_after(10)

    assert on_ranks(2, work) == [None, None]
    assert steps_in(tmp_path) == [10, 20, 30]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="module")
def children():
    with subprocess.Popen([sys.executable, CHILDREN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def begin(children, mode: str, folder: Path, step: int, ranks: int, timeout_s: float) -> list[int]:
    children.stdin.write(f"{mode} {folder} {step} {ranks} {timeout_s}\n".encode())
    children.stdin.flush()
    for line in iter(children.stdout.readline, b""):
        if line.startswith(b"begun"):
            return list(map(int, line.split()[1:]))
    raise AssertionError("the children have ended")


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("how", "timeout_s", "at_most_s"), [(signal.SIGKILL, 30.0, 10.0), (signal.SIGSTOP, 1.0, 15.0)])
def test_a_rank_lost_before_its_part_fails_the_others_in_time(tmp_path, children, how, timeout_s, at_most_s):
    """A killed rank is seen at once, one that hangs at the deadline; the checkpoint before is as it was."""
    save_on_ranks(tmp_path, 2, [1])
    before = {path: path.read_bytes() for path in (tmp_path / "step_00000001").iterdir()}
    pids = begin(children, "pause", tmp_path, 2, 2, timeout_s)
    lines = []
    while not lines or b"paused" not in lines[-1]:
        lines.append(children.stdout.readline())
    began = time.monotonic()
    os.kill(pids[1], how)
    while b"failed 0 MissingPartsError\n" not in lines:
        lines.append(children.stdout.readline())
        assert b"ended" not in lines[-1], lines
    assert time.monotonic() - began < at_most_s
    kill(pids[1])
    while children.stdout.readline() != b"ended\n":
        pass
    assert steps_in(tmp_path) == [1]
    assert {path: path.read_bytes() for path in (tmp_path / "step_00000001").iterdir()} == before
    Checkpointer(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_ranks_killed_at_any_moment(tmp_path, children):
    """Ranks go on with one run, of another number each time; all of them or one is killed at a random moment."""
    rng = random.Random(2)
    step, torn, alone = 0, 0, 0
    for turn in range(60):
        if turn >= 12 and torn >= 3:  # how many kills hit a write is a matter of the machine's speed
            break
        size = rng.choice([2, 3])
        pids = begin(children, "run", tmp_path, step, size, 600.0)
        for _ in range(rng.randrange(1, 3 * size)):
            children.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.12))
        if turn % 3 == 0:
            victim = rng.randrange(size)
            kill(pids[victim])
            time.sleep(0.3)  # the others find out, or wait for it
            alone += 1
        for pid in pids:
            kill(pid)
        while children.stdout.readline() != b"ended\n":
            pass
        torn += any(tmp_path.glob(".*"))
        for path in list_complete(tmp_path):
            assert_holds(path, step_of(path))
        newest = newest_complete(tmp_path)
        steps = steps_in(tmp_path)
        reached = -1 if newest is None else step_of(newest)
        assert reached >= step - 1, "what was whole is gone"
        assert [kept for kept in range(0, reached, 10) if kept not in steps] == []
        step = reached + 1
    assert step > 5
    assert torn >= 3, "too few kills hit a write: the test shows nothing"
    assert alone >= 4
