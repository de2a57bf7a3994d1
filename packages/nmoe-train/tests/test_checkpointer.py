"""Checkpoints in the background: a snapshot of one moment, whole or absent, pruned, refused when altered."""

import errno
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from nmoe.model import checkpoint
from nmoe.model.errors import CorruptCheckpointError, DiskSpaceError, InvalidEntryError
from nmoe.model.tensor_pieces import whole_pieces
from nmoe.train import checkpointer as under_test
from nmoe.train.checkpointer import Checkpointer, list_complete, load, newest_complete, step_of
from nmoe.train.errors import CheckpointWriteError, RefusedCheckpointError

CHILDREN = Path(__file__).with_name("children.py")


@pytest.fixture(scope="module")
def children():
    command = [sys.executable, CHILDREN, "nmoe.train.checkpointer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.rand(4, 5, generator=generator).bfloat16(),
        "moment": torch.rand(4, 5, generator=generator),
        "scalar": torch.tensor(step),
    }


def assert_holds(path: Path, step: int) -> None:
    folder = load(path)
    expected = state(step)
    assert set(folder.names) == set(expected)
    for name, tensor in folder.tensors().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def save_all(folder: Path, steps, **options) -> Checkpointer:
    checkpointer = Checkpointer(folder, **{"keep": 100, **options})
    for step in steps:
        checkpointer.save(step, state(step), {"progress": {"step": step}})
    checkpointer.wait()
    return checkpointer


def steps_in(folder: Path) -> list[int]:
    return [step_of(path) for path in list_complete(folder)]


def flip(path: Path) -> None:
    file = path / "tensors-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_saved_is_loaded(tmp_path):
    checkpointer = save_all(tmp_path / "c", [3, 20])
    assert newest_complete(tmp_path / "c") == checkpointer.path(20) == tmp_path / "c" / "step_00000020"
    assert_holds(checkpointer.path(3), 3)
    assert_holds(checkpointer.path(20), 20)
    assert load(checkpointer.path(20)).document("progress") == {"step": 20}


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert newest_complete(tmp_path / "none") is None
    assert list_complete(tmp_path / "none") == []
    Checkpointer(tmp_path / "none", keep=1).wait()
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_is_of_the_moment_of_its_save(tmp_path, monkeypatch):
    """The state, documents included, changes in place while the write has not even begun."""
    may_write = threading.Event()
    write = under_test.write_folder
    monkeypatch.setattr(under_test, "write_folder", lambda *a, **k: (may_write.wait(), write(*a, **k)))
    checkpointer = Checkpointer(tmp_path, keep=2)
    tensors, documents = state(1), {"progress": {"step": 1}, "list": [1]}
    parameter = torch.nn.Parameter(torch.ones(3))
    checkpointer.save(1, {**tensors, "parameter": parameter, "view": tensors["moment"].T}, documents)
    assert list_complete(tmp_path) == []
    expected_view = tensors["moment"].T.clone()
    with torch.no_grad():
        for tensor in (*tensors.values(), parameter):
            tensor.zero_()
    documents["progress"] = {"step": 2}
    documents["list"].append(2)
    may_write.set()
    checkpointer.wait()
    folder = load(checkpointer.path(1))
    for name, tensor in state(1).items():
        assert torch.equal(folder.tensor(name), tensor)
    assert torch.equal(folder.tensor("parameter"), torch.ones(3))
    assert torch.equal(folder.tensor("view"), expected_view)
    assert folder.document("progress") == {"step": 1}
    assert folder.document("list") == [1]


def test_one_write_at_a_time(tmp_path, monkeypatch):
    running, most = [], []
    write = under_test.write_folder

    def slow(path, tensors, documents, **options):
        running.append(path)
        most.append(len(running))
        time.sleep(0.05)
        write(path, tensors, documents, **options)
        running.remove(path)

    monkeypatch.setattr(under_test, "write_folder", slow)
    save_all(tmp_path, range(4))
    assert most == [1, 1, 1, 1]
    for step in range(4):
        assert_holds(tmp_path / f"step_{step:08}", step)


def test_host_memory_of_the_snapshot_is_reused(tmp_path):
    checkpointer = save_all(tmp_path, [1])
    before = {name: tensor.data_ptr() for name, tensor in checkpointer._snapshot.items()}
    checkpointer.save(2, state(2), {})
    assert {name: tensor.data_ptr() for name, tensor in checkpointer._snapshot.items()} == before
    checkpointer.save(3, {"moment": torch.zeros(2), "scalar": torch.tensor(3)}, {})
    checkpointer.wait()
    assert set(load(checkpointer.path(3)).names) == {"moment", "scalar"}
    assert load(checkpointer.path(3)).tensor("moment").shape == (2,)
    assert_holds(checkpointer.path(2), 2)


@pytest.mark.parametrize(
    ("keep", "keep_every", "remaining"),
    [
        (1, None, [90]),
        (2, None, [80, 90]),
        (100, None, [10, 20, 30, 40, 50, 60, 70, 80, 90]),
        (2, 40, [40, 80, 90]),
        (1, 30, [30, 60, 90]),
        (2, 7, [70, 80, 90]),
    ],
)
def test_pruning(tmp_path, keep, keep_every, remaining):
    save_all(tmp_path, range(10, 100, 10), keep=keep, keep_every=keep_every)
    assert steps_in(tmp_path) == remaining
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08}" for step in remaining]
    for step in remaining:
        assert_holds(tmp_path / f"step_{step:08}", step)


def test_nothing_is_pruned_for_a_checkpoint_that_failed(tmp_path, monkeypatch):
    checkpointer = save_all(tmp_path, [1, 2], keep=2)

    def fail(*args, **options):
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr(under_test, "write_folder", fail)
    checkpointer.save(3, state(3), {})
    with pytest.raises(CheckpointWriteError, match=r"step_00000003.*disk on fire"):
        checkpointer.wait()
    assert steps_in(tmp_path) == [1, 2]
    checkpointer.wait()


def test_a_kill_during_removal_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    monkeypatch.setattr(under_test.shutil, "rmtree", lambda path: (path / "manifest.json").rename(path / "gone"))
    save_all(tmp_path, [3], keep=1)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [3]
    assert len(list(tmp_path.iterdir())) == 3
    Checkpointer(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_failure_in_the_background_is_told_once_and_raised_by_wait(tmp_path, monkeypatch):
    checkpointer = save_all(tmp_path, [1])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        checkpointer.save(2, state(2), {})
        with pytest.raises(DiskSpaceError):
            checkpointer.wait()
    assert checkpointer.failure() is None, "wait has told it"
    checkpointer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_save_after_a_failed_one_is_made_and_makes_it_good(tmp_path, monkeypatch):
    checkpointer = save_all(tmp_path, [1])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "bad block")))
        checkpointer.save(2, state(2), {})
        checkpointer._join()
    checkpointer.save(3, state(3), {})
    assert "bad block" in str(checkpointer.failure())
    assert checkpointer.failure() is None, "told once"
    checkpointer.wait()
    assert step_of(newest_complete(tmp_path)) == 3


def break_steps(monkeypatch, *steps: int) -> None:
    write = under_test.write_folder

    def fail(path, tensors, documents, **options):
        if step_of(path) in steps:
            raise OSError(errno.EIO, "bad block")
        write(path, tensors, documents, **options)

    monkeypatch.setattr(under_test, "write_folder", fail)


def test_a_failure_that_was_made_good_is_still_told_after_wait(tmp_path, monkeypatch):
    break_steps(monkeypatch, 1, 2)
    checkpointer = save_all(tmp_path, [1, 2, 3])
    told = list(iter(checkpointer.failure, None))
    assert [failure.path for failure in told] == [checkpointer.path(1), checkpointer.path(2)]
    assert_holds(checkpointer.path(3), 3)


def test_wait_raises_the_last_failure_though_it_was_told(tmp_path, monkeypatch):
    """A run that ends without its last state fails, even if it has already said why."""
    break_steps(monkeypatch, 2)
    checkpointer = save_all(tmp_path, [1])
    checkpointer.save(2, state(2), {})
    checkpointer._join()
    assert checkpointer.failure() is not None
    with pytest.raises(CheckpointWriteError, match="step_00000002"):
        checkpointer.wait()
    checkpointer.wait()


def test_only_a_write_makes_a_failure_good(tmp_path, monkeypatch):
    """A save that is refused wrote nothing."""
    break_steps(monkeypatch, 1)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state(1), {})
    with pytest.raises(InvalidEntryError):
        checkpointer.save(2, state(2), {"bad": float("nan")})
    with pytest.raises(CheckpointWriteError, match="step_00000001"):
        checkpointer.wait()


def test_asking_for_a_failure_does_not_wait_for_the_write(tmp_path, monkeypatch):
    may_write = threading.Event()
    monkeypatch.setattr(under_test, "write_folder", lambda *a, **k: may_write.wait(30))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state(1), {})
    assert checkpointer.failure() is None
    assert checkpointer._thread.is_alive()
    may_write.set()
    checkpointer.wait()


def test_a_leftover_is_cleaned_though_its_writers_number_lives_again(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "step_00000002").rename(tmp_path / f".step_00000002.old-{os.getppid()}")
    (tmp_path / f".step_00000009.tmp-{os.getppid()}").mkdir()
    Checkpointer(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert_holds(tmp_path / "step_00000002", 2)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_full_disk_and_a_bad_document_are_seen_before_the_copy(tmp_path, monkeypatch):
    checkpointer = save_all(tmp_path, [1])
    with pytest.raises(InvalidEntryError):
        checkpointer.save(2, state(2), {"bad": float("nan")})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(DiskSpaceError):
        checkpointer.save(2, state(2), {})
    checkpointer.wait()
    assert torch.equal(checkpointer._snapshot["moment"], state(1)["moment"])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_step_saved_again_is_replaced(tmp_path):
    checkpointer = save_all(tmp_path, [7])
    checkpointer.save(7, {**state(7), "more": torch.ones(1)}, {})
    checkpointer.wait()
    assert "more" in load(checkpointer.path(7)).names
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_drop_after(tmp_path):
    checkpointer = save_all(tmp_path, [10, 20, 30])
    (tmp_path / "step_00000040").mkdir()
    (tmp_path / "notes").mkdir()
    checkpointer.drop_after(20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000010", "step_00000020"]
    checkpointer.drop_after(-1)
    assert list_complete(tmp_path) == []


def test_an_incomplete_folder_is_no_checkpoint(tmp_path):
    save_all(tmp_path, [10, 20, 123456789])
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    (tmp_path / "step_00000030").mkdir()
    (tmp_path / ".step_00000040.tmp-1").mkdir()
    (tmp_path / "step_50").mkdir()
    assert steps_in(tmp_path) == [10, 123456789]
    assert newest_complete(tmp_path) == tmp_path / "step_123456789"


def test_an_altered_checkpoint_is_refused_and_an_older_whole_one_offered(tmp_path):
    save_all(tmp_path, [10, 20, 30, 40])
    flip(tmp_path / "step_00000040")
    with pytest.raises(
        RefusedCheckpointError, match=r"step_00000040.*tensors-00001.safetensors.*step_00000030"
    ) as caught:
        load(tmp_path / "step_00000040")
    assert caught.value.older == tmp_path / "step_00000030"
    assert isinstance(caught.value.__cause__, CorruptCheckpointError)

    (tmp_path / "step_00000030" / "tensors-00001.safetensors").write_bytes(b"")
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    for step in (40, 30, 20):
        with pytest.raises(RefusedCheckpointError, match=f"step_000000{step}") as caught:
            load(tmp_path / f"step_000000{step}")
        assert caught.value.older == tmp_path / "step_00000010"
    flip(tmp_path / "step_00000010")
    with pytest.raises(RefusedCheckpointError, match="no complete older") as caught:
        load(tmp_path / "step_00000010")
    assert caught.value.older is None


def test_a_folder_of_another_name_is_opened_or_refused_too(tmp_path):
    save_all(tmp_path, [10])
    (tmp_path / "step_00000010").rename(tmp_path / "imported")
    assert "weight" in load(tmp_path / "imported").names
    flip(tmp_path / "imported")
    with pytest.raises(RefusedCheckpointError):
        load(tmp_path / "imported")


def test_sigkill_at_any_moment(tmp_path, children):
    """Children continue one run, each killed at a random moment of its back-to-back writes and removals."""
    state_of = runpy.run_path(str(CHILDREN))["state_of"]
    rng = random.Random(1)
    step, last, torn = 0, -1, 0
    for _ in range(24):
        children.stdin.write(f"checkpoints {tmp_path} {step}\n".encode())
        children.stdin.flush()
        begun, child = children.stdout.readline().split()
        assert begun == b"begun"
        lines = [children.stdout.readline() for _ in range(rng.randrange(4))]
        time.sleep(rng.uniform(0.0, 0.04))
        os.kill(int(child), signal.SIGKILL)
        said = [int(line.split()[1]) for line in (*lines, *iter(children.stdout.readline, b"ended\n"))]

        torn += any(tmp_path.glob(".*"))
        for path in list_complete(tmp_path):
            folder = load(path)
            tensors, documents = state_of(step_of(path))
            assert folder.document("progress") == documents["progress"]
            assert set(folder.names) == set(tensors)
            for name, tensor in folder.tensors().items():
                assert torch.equal(tensor, tensors[name])
        steps = steps_in(tmp_path)
        # What was said to be done is on disk; pruning took nothing that was to stay.
        last = max([last, *said])
        assert max(steps, default=-1) >= last
        assert [kept for kept in range(0, max(steps, default=-1), 10) if kept not in steps] == []
        step = max(steps, default=-1) + 1
    assert step > 10
    assert torn >= 5, "too few kills hit a write: the test shows nothing"


def test_a_process_that_fails_after_save_still_finishes_its_checkpoint(tmp_path, children):
    children.stdin.write(f"unfinished {tmp_path} 7\n".encode())
    children.stdin.flush()
    assert [children.stdout.readline().split()[0] for _ in range(2)] == [b"begun", b"ended"]
    assert steps_in(tmp_path) == [7]
    load(tmp_path / "step_00000007")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_state_may_change_right_after_save(tmp_path):
    """The copy sees what the stream had computed by then, and nothing that it computes afterwards."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    weight = torch.zeros(64 << 20, device="cuda")
    for step in (1, 2):
        for _ in range(50):
            weight += 1
        checkpointer.save(step, {"weight": weight, "scalar": weight[0]}, {})
    weight.zero_()
    checkpointer.wait()
    for step in (1, 2):
        folder = load(checkpointer.path(step))
        assert folder.tensor("weight").unique().tolist() == [50.0 * step]
        assert folder.tensor("scalar").item() == 50.0 * step


@pytest.mark.parametrize(
    ("keep", "keep_every", "there", "to_come", "most"),
    [
        (2, None, [], [5], 1),
        (2, None, [], [1, 2], 2),
        (2, None, [], range(1, 100), 3),
        (2, None, [1, 2], [3], 3),
        (2, None, [1, 2], [], 2),
        (1, None, [1, 2, 3], [4, 5], 4),  # more were kept before
        (2, 10, [], range(1, 100), 2 + 9 + 1),
        (2, 10, [10, 20, 28], [29], 4),
    ],
)
def test_how_many_stand_at_once_is_what_saving_leads_to(tmp_path, keep, keep_every, there, to_come, most):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep, keep_every)
    for step in there:
        (checkpointer.path(step)).mkdir(parents=True)
        (checkpointer.path(step) / "manifest.json").touch()
    pieces = whole_pieces({"a": torch.ones(3)})
    assert checkpointer.check_room(pieces, {}, to_come)[1] == most
    seen = [len(list_complete(checkpointer.folder))]
    for step in to_come:
        checkpointer.path(step).mkdir(parents=True)
        (checkpointer.path(step) / "manifest.json").touch()
        seen.append(len(list_complete(checkpointer.folder)))
        checkpointer._prune()
    assert max(seen) == most
