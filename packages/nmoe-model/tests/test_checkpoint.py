"""The tensor folder: what is written is read back bit for bit, or refused by name."""

import errno
import hashlib
import json
import os
import pickle
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from nmoe.model import checkpoint, folder_json, folder_place, tensor_file
from nmoe.model.checkpoint import check_space, clean_leftovers, is_complete, leftover_path, open_folder, write_folder
from nmoe.model.errors import (
    CheckpointVersionError,
    CorruptCheckpointError,
    DiskSpaceError,
    FolderExistsError,
    IncompleteCheckpointError,
    InvalidEntryError,
    MissingEntryError,
)
from safetensors.torch import load_file, save_file

DOCUMENTS = {
    "state": {"step": 7, "lr": 0.1 + 0.2, "tiny": 5e-324, "on": True, "none": None, "list": [1, [2.5, "é\u2028"]]},
    "config": {},
}


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every bit pattern may occur: NaN payloads and negative zeros are values like any other."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "model.a": random_bits(torch.float32, (3, 5), seed),
        "model.c": random_bits(torch.float32, (2,), seed + 3),
        "model.b": random_bits(torch.bfloat16, (7,), seed + 1),
        "optim.a": random_bits(torch.int64, (), seed + 2),
    }


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def listing(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "f", small(), DOCUMENTS, max_file_bytes=64)
    assert len(list((tmp_path / "f").glob("*.safetensors"))) > 1
    return tmp_path / "f"


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    shapes = [(), (1,), (0, 3), (5, 3, 2), (257,)]
    tensors = {
        f"{dtype}.{shape}": random_bits(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate((d, s) for d in tensor_file.DTYPES for s in shapes)
    }
    base = random_bits(torch.int32, (6, 8))
    tensors |= {"transposed": base.T, "strided": base[::2, 1::3], "expanded": base[:1].expand(4, 8), "alias": base}
    tensors["parameter"] = torch.nn.Parameter(torch.randn(3))

    write_folder(tmp_path / "f", tensors, DOCUMENTS, max_file_bytes=700)

    found = open_folder(tmp_path / "f")
    assert set(found.names) == set(tensors)
    together = found.tensors()
    for name, expected in tensors.items():
        assert_same(found.tensor(name), expected)
        assert_same(together[name], expected)
    assert {name: found.document(name) for name in found.document_names} == DOCUMENTS


def test_a_foreign_reader_agrees_on_every_file(tmp_path):
    """The safetensors package's own loader, which knows nothing of the manifest, finds the same tensors, aligned."""
    tensors = {f"{seed}": random_bits(dtype, (seed % 5 + 1,), seed) for seed, dtype in enumerate(tensor_file.DTYPES)}
    write_folder(tmp_path / "f", tensors, {}, max_file_bytes=40)
    found = {}
    for file in sorted((tmp_path / "f").glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(found)
        assert sum(tensor.nbytes for tensor in part.values()) <= 40 or len(part) == 1
        found |= part
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for name in part:
            assert (start + header[name]["data_offsets"][0]) % part[name].element_size() == 0
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


def test_a_tensor_larger_than_a_file_has_its_own(tmp_path):
    tensors = {"big": torch.zeros(100), "a": torch.ones(1), "b": torch.ones(1)}
    write_folder(tmp_path / "f", tensors, {}, max_file_bytes=8)
    files = [set(load_file(file)) for file in sorted((tmp_path / "f").glob("*.safetensors"))]
    assert {"big"} in files
    assert {"a", "b"} in files


def test_equal_content_gives_equal_bytes_in_any_order(tmp_path):
    tensors = small()
    write_folder(tmp_path / "a", tensors, DOCUMENTS, max_file_bytes=64)
    backwards = dict(reversed(tensors.items())), dict(reversed(DOCUMENTS.items()))
    write_folder(tmp_path / "b", *backwards, max_file_bytes=64)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    write_folder(tmp_path / "c", small(seed=9), DOCUMENTS, max_file_bytes=64)
    assert listing(tmp_path / "a") != listing(tmp_path / "c")


def test_a_folder_of_one_process_has_the_bytes_that_it_always_had(tmp_path, monkeypatch):
    """The digest was computed with nmoe-model as it was before tensors could be in pieces."""
    monkeypatch.setattr(folder_place, "_tool", lambda: "nmoe-model of a test")
    tensors = {
        "m.a": torch.arange(15, dtype=torch.float32).view(3, 5),
        "m.b": torch.arange(7).bfloat16(),
        "m.t": torch.arange(6).view(2, 3).T,
        "m.empty": torch.zeros(0, 3),
        "m.scalar": torch.tensor(3, dtype=torch.int16),
        "m.flag": torch.tensor([True, False]),
    }
    documents = {"state": {"step": 7, "x": 0.1, "t": "é"}, "config": {}}
    write_folder(tmp_path / "f", tensors, documents, max_file_bytes=64)
    digest = hashlib.sha256()
    for name, content in sorted(listing(tmp_path / "f").items()):
        digest.update(name.encode() + content)
    assert digest.hexdigest() == "dc7f64f8101c033728601f70a50e88424837b5537fc934590a24189ca16870bd"


def test_prefixes(folder):
    found = open_folder(folder)
    assert set(found.tensors("model.")) == {"a", "b", "c"}
    assert_same(found.tensors("optim.")["a"], small()["optim.a"])
    assert found.tensors("nothing.") == {}


def test_unknown_names_are_refused_with_the_nearest(folder):
    found = open_folder(folder)
    with pytest.raises(MissingEntryError, match=r"model\.a"):
        found.tensor("model.aa")
    with pytest.raises(MissingEntryError, match="'state'"):
        found.document("stat")
    with pytest.raises(MissingEntryError):
        found.document("manifest")


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(folder):
    loaded = open_folder(folder).tensor("model.a")
    loaded.fill_(1.0)
    del loaded
    assert_same(open_folder(folder).tensor("model.a"), small()["model.a"])


def test_a_loaded_tensor_outlives_its_folder(folder):
    loaded = open_folder(folder).tensors()
    shutil.rmtree(folder)
    for name, expected in small().items():
        assert_same(loaded[name], expected)


def test_every_flipped_bit_is_refused_by_name(folder):
    rng = random.Random(0)
    for name, content in listing(folder).items():
        for position in range(len(content)):
            altered = bytearray(content)
            altered[position] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(altered)
            with pytest.raises(CorruptCheckpointError) as caught:
                open_folder(folder)
            assert caught.value.file == name
            assert name in str(caught.value)
        (folder / name).write_bytes(content)
    open_folder(folder)


def test_a_manifest_that_says_the_same_in_other_bytes_is_refused(folder):
    content = (folder / "manifest.json").read_bytes()
    for altered in (content.replace(b"\n ", b"\n\t", 1), content + b"\n", json.dumps(json.loads(content)).encode()):
        assert json.loads(altered) == json.loads(content)
        (folder / "manifest.json").write_bytes(altered)
        with pytest.raises(CorruptCheckpointError):
            open_folder(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shortened_or_lengthened_file_is_refused_by_name(folder, verify):
    for name, content in listing(folder).items():
        for damaged in (b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\0"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(CorruptCheckpointError) as caught:
                open_folder(folder, verify=verify)
            assert caught.value.file == name
        (folder / name).write_bytes(content)
    open_folder(folder, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_refused_by_name(folder, verify):
    for name, content in listing(folder).items():
        (folder / name).unlink()
        with pytest.raises(IncompleteCheckpointError if name == "manifest.json" else CorruptCheckpointError) as caught:
            open_folder(folder, verify=verify)
        assert name in str(caught.value)
        assert is_complete(folder) == (name != "manifest.json")
        (folder / name).write_bytes(content)


def test_files_that_the_manifest_does_not_name_do_not_matter(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "tensors-99999.safetensors").write_bytes(b"junk")
    assert set(open_folder(folder).names) == set(small())


def test_a_missing_folder_is_incomplete(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(IncompleteCheckpointError, match="no such folder"):
            open_folder(path)


def forge(folder: Path, **changes: object) -> None:
    """A manifest that an attacker sealed again after changing it."""
    manifest = folder_json.unseal_manifest(folder, (folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(folder_json.seal_manifest({**manifest, **changes}))


def test_a_newer_version_is_refused(folder, monkeypatch):
    content = folder_json.unseal_manifest(folder, (folder / "manifest.json").read_bytes())
    monkeypatch.setattr(folder_json, "WHOLE", 3)
    (folder / "manifest.json").write_bytes(folder_json.seal_manifest(content))
    monkeypatch.undo()
    with pytest.raises(CheckpointVersionError, match=r"nmoe-tensor-folder 2.*nmoe-tensor-folder 3.*nmoe-model"):
        open_folder(folder)


def test_nothing_outside_the_folder_is_opened(folder):
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    entry = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    for name in ("../secret.json", str(secret)):
        forge(folder, files={name: entry})
        with pytest.raises(CorruptCheckpointError, match="secret"):
            open_folder(folder)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (Bomb.path,))


def test_a_pickle_in_a_tensor_file_is_refused_and_not_run(folder):
    Bomb.path = str(folder.parent / "exploded")
    name = "tensors-00001.safetensors"
    content = pickle.dumps(Bomb())
    (folder / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge(folder, files={name: entry}, tensors={"a": {"file": name, "dtype": "F32", "shape": [1]}})
    with pytest.raises(CorruptCheckpointError):
        open_folder(folder).tensors()
    assert not os.path.exists(Bomb.path)


def test_a_tensor_that_is_not_as_the_manifest_says_is_refused(folder):
    name = "tensors-00001.safetensors"
    save_file({"a": torch.zeros(3)}, folder / name)
    content = (folder / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for described in ({"dtype": "F32", "shape": [4]}, {"dtype": "I32", "shape": [3]}):
        forge(folder, files={name: entry}, tensors={"a": {"file": name, **described}})
        with pytest.raises(CorruptCheckpointError, match=name):
            open_folder(folder).tensor("a")
    forge(folder, files={name: entry}, tensors={"b": {"file": name, "dtype": "F32", "shape": [3]}})
    with pytest.raises(CorruptCheckpointError, match=name):
        open_folder(folder).tensor("b")


@pytest.mark.parametrize(
    ("tensors", "documents"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, {}),
        ({"a": torch.eye(2).to_sparse()}, {}),
        ({"a": torch.zeros(2, device="meta")}, {}),
        ({"__metadata__": torch.zeros(2)}, {}),
        ({}, {"d": float("nan")}),
        ({}, {"d": {"x": [1.0, float("-inf")]}}),
        ({}, {"d": {1: "int keys would come back as strings"}}),
        ({}, {"d": {"x": torch.zeros(1)}}),
        ({}, {"d": {1, 2}}),
        ({}, {"manifest": {}}),
        ({}, {"../d": {}}),
        ({}, {"": {}}),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(tmp_path, tensors, documents):
    with pytest.raises(InvalidEntryError):
        write_folder(tmp_path / "f", tensors, documents)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_unless_it_may_be_replaced(folder):
    before = listing(folder)
    with pytest.raises(FolderExistsError):
        write_folder(folder, small(seed=5), {})
    assert listing(folder) == before
    write_folder(folder, small(seed=5), {}, replace=True)
    assert_same(open_folder(folder).tensor("model.a"), small(seed=5)["model.a"])
    assert [entry.name for entry in folder.parent.iterdir()] == ["f"]


def test_a_file_in_the_way_is_never_replaced(tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FolderExistsError):
        write_folder(tmp_path / "f", small(), {}, replace=True)
    assert (tmp_path / "f").read_text() == "mine"


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    tensors = {"a": torch.zeros(1 << 20)}
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, tensors["a"].nbytes))
    for attempt in (check_space, write_folder):
        with pytest.raises(DiskSpaceError) as caught:
            attempt(tmp_path / "new" / "f", tensors, {})
        assert caught.value.need > tensors["a"].nbytes
        assert caught.value.free == tensors["a"].nbytes
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, tensors["a"].nbytes * 2))
    check_space(tmp_path / "new" / "f", tensors, {})
    write_folder(tmp_path / "new" / "f", tensors, {})


def test_need_covers_what_is_written(tmp_path, monkeypatch):
    tensors = {f"a/long/name/{index}": torch.zeros(index % 3) for index in range(500)}
    documents = {"d": ["x" * 100] * 1000}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(0, 0, 0))
        with pytest.raises(DiskSpaceError) as caught:
            check_space(tmp_path / "f", tensors, documents)
    write_folder(tmp_path / "f", tensors, documents)
    written = sum(len(content) for content in listing(tmp_path / "f").values())
    assert written <= caught.value.need <= written + (2 << 20)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("failing", range(8))
def test_a_disk_that_fills_while_writing_leaves_what_was_there(folder, monkeypatch, error, failing):
    """Any of the writes may be the one that fails: tensors, documents, the manifest."""
    before = listing(folder)
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == failing + 1:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tensor_file, "_IO_THREADS", 1)
    monkeypatch.setattr(tensor_file.os, "fsync", fsync)
    expected = OSError if error == errno.EIO else DiskSpaceError
    with pytest.raises(expected):
        write_folder(folder, small(seed=5), DOCUMENTS, max_file_bytes=64, replace=True)
    monkeypatch.undo()
    remaining = {entry.name for entry in folder.parent.iterdir()}
    if failing < 7:
        assert remaining == {"f"}
        assert listing(folder) == before
    else:
        # The parent's sync comes after the new folder is in place, and before the old one goes.
        clean_leftovers(folder.parent)
        assert_same(open_folder(folder).tensor("model.a"), small(seed=5)["model.a"])
    write_folder(folder, small(seed=6), DOCUMENTS, replace=True)
    assert [entry.name for entry in folder.parent.iterdir()] == ["f"]


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = dead_pid()
    for name in (f".f.tmp-{dead}", f".other.tmp-{dead}", ".f.tmp-1", f".f.tmp-{os.getpid()}", ".f.tmp-x", "f.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors-00001.safetensors").write_bytes(b"torn")
    write_folder(tmp_path / "f", small(), {})
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "f",
        f".other.tmp-{dead}",
        ".f.tmp-1",
        ".f.tmp-x",
        "f.tmp-1",
    }
    clean_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"f", ".f.tmp-1", ".f.tmp-x", "f.tmp-1"}
    clean_leftovers(tmp_path / "missing")


def test_a_replacement_killed_between_its_two_renames_is_undone(folder):
    dead = dead_pid()
    shutil.copytree(folder, folder.parent / f".f.tmp-{dead}")
    folder.rename(folder.parent / f".f.old-{dead}")
    clean_leftovers(folder.parent)
    assert [entry.name for entry in folder.parent.iterdir()] == ["f"]
    open_folder(folder)
    shutil.copytree(folder, leftover_path(folder, "old"))
    clean_leftovers(folder.parent)
    assert [entry.name for entry in folder.parent.iterdir()] == ["f"]


def test_leftovers_go_where_the_caller_knows_that_their_writers_are_dead(folder):
    """Small process numbers come again in every container."""
    whole, alive = listing(folder), os.getppid()
    folder.rename(folder.parent / f".f.old-{alive}")
    for name in (f".f.tmp-{alive}", ".g.tmp-1", ".g.tmp-x"):
        (folder.parent / name).mkdir()
    before = sorted(folder.parent.iterdir())
    clean_leftovers(folder.parent)
    assert sorted(folder.parent.iterdir()) == before
    clean_leftovers(folder.parent, "f", writers_are_dead=True)
    assert {entry.name for entry in folder.parent.iterdir()} == {"f", ".g.tmp-1", ".g.tmp-x"}
    assert listing(folder) == whole
    clean_leftovers(folder.parent, writers_are_dead=True)
    assert {entry.name for entry in folder.parent.iterdir()} == {"f", ".g.tmp-x"}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory counter")
def test_no_second_copy_in_memory(tmp_path):
    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

    tensors = {f"{index}": torch.ones(8 << 20) for index in range(4)}
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    write_folder(tmp_path / "f", tensors, {}, max_file_bytes=64 << 20)
    open_folder(tmp_path / "f")
    assert peak() - before < tensors["0"].nbytes


def test_sigkill_at_any_moment_leaves_only_whole_folders(tmp_path):
    script = Path(__file__).with_name("write_folders.py")
    content = runpy.run_path(str(script))["content"]
    rng = random.Random(20)
    root = tmp_path / "root"
    next_number, last_acknowledged, torn = 0, -1, 0

    def check(folder: Path) -> int:
        opened = open_folder(folder)
        number = opened.document("state")["number"]
        tensors, documents = content(number)
        assert opened.document("state") == documents["state"]
        assert set(opened.names) == set(tensors)
        for name, tensor in opened.tensors().items():
            assert_same(tensor, tensors[name])
        return number

    with subprocess.Popen([sys.executable, script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        for _ in range(24):
            writer.stdin.write(b"%d\n" % next_number)
            writer.stdin.flush()
            begun, child = writer.stdout.readline().split()
            assert begun == b"begun"
            lines = [writer.stdout.readline() for _ in range(rng.randrange(3))]
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(int(child), signal.SIGKILL)
            acknowledged = [int(line.split()[1]) for line in (*lines, *iter(writer.stdout.readline, b"ended\n"))]

            torn += any(root.glob(".*"))
            clean_leftovers(root)
            assert not any(root.glob(".*"))
            written = sorted(check(folder) for folder in root.glob("folder_*"))
            assert written[: len(acknowledged)] == acknowledged, "a folder that was said to be written is gone"
            last_acknowledged = max([last_acknowledged, *acknowledged])
            next_number = max([next_number, *(number + 1 for number in written)])
            if last_acknowledged >= 0:
                assert check(root / "latest") >= last_acknowledged
            for folder in root.glob("folder_*"):
                shutil.rmtree(folder)
        writer.stdin.close()
    assert writer.returncode == 0
    assert torn >= 5, "too few kills hit a write: the test shows nothing"
