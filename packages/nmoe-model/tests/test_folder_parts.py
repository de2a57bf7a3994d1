"""Folders of several writers: whatever each of them holds, what is read is the whole, a range of it, or a refusal."""

import errno
import json
import os
import random
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from nmoe.model import folder_json, folder_parts, tensor_file
from nmoe.model.checkpoint import clean_leftovers, open_folder, write_folder
from nmoe.model.errors import (
    CorruptCheckpointError,
    DiskSpaceError,
    FolderExistsError,
    InvalidEntryError,
    WeightsMismatchError,
)
from nmoe.model.folder_parts import (
    MissingPartsError,
    NotPublishedError,
    PartFailedError,
    abandon_folder,
    await_end,
    begin_folder,
    complete_folder,
    leave_failure,
    plan_part,
    write_part,
)
from nmoe.model.tensor_pieces import TensorPiece, join_pieces, layout_problem, refuse_parts, whole_pieces
from nmoe.model.weights import fill_pieces

TEXTS = {"state.json": b'{"step": 7}'}


def never(rank: int) -> bool:
    return False


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


def wholes() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, and of every kind of shape."""
    shapes = [(7,), (3, 5), (2, 3, 4), (), (1,), (0, 3), (64, 9)]
    return {
        f"m/{str(dtype).removeprefix('torch.')}.{shape}": random_bits(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate((d, s) for d in tensor_file.DTYPES for s in shapes)
    }


def dealt(tensors: dict[str, torch.Tensor], n_ranks: int, seed: int = 0) -> list[list[TensorPiece]]:
    """Every tensor cut at random and dealt to the ranks at random: some whole, some in neighbours, some in shreds."""
    rng = random.Random(seed)
    ranks: list[list[TensorPiece]] = [[] for _ in range(n_ranks)]
    for name, tensor in tensors.items():
        flat, total = tensor.reshape(-1), tensor.numel()
        cuts = sorted({0, total, *(rng.randrange(total + 1) for _ in range(rng.randrange(4)))})
        for first, last in pairwise(cuts):
            ranks[rng.randrange(n_ranks)].append(TensorPiece(name, tuple(tensor.shape), first, flat[first:last]))
        # Every rank names every tensor, as one does that holds nothing of it.
        for pieces in ranks:
            pieces.append(TensorPiece(name, tuple(tensor.shape), rng.randrange(total + 1), flat[:0]))
    for pieces in ranks:
        rng.shuffle(pieces)
    return ranks


def snapshot_of(runs) -> dict[str, torch.Tensor]:
    found = {}
    for run in runs:
        if run.is_stored:
            found[run.key] = run.blank("cpu")
            run.copy_to(found[run.key])
    return found


def write_ranks(path: Path, ranks: list[list[TensorPiece]], texts: dict[str, bytes] = TEXTS) -> None:
    """All ranks, one after the other; the last is rank 0, which has nothing to wait for."""
    temporary = begin_folder(path, 0)
    for rank, pieces in enumerate(ranks):
        runs = join_pieces(pieces)
        write_part(temporary, path, rank, runs, snapshot_of(runs))
    complete_folder(temporary, path, len(ranks), texts, 0.0, never)


def listing(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two ranks: `a` and `b` in pieces of both, `c` whole."""
    a, b, c = torch.arange(10.0), torch.arange(6).view(2, 3), torch.ones(3)
    first = [TensorPiece("a", (10,), 0, a[:4]), TensorPiece("a", (10,), 7, a[7:]), TensorPiece("b", (2, 3), 3, b[1])]
    second = [TensorPiece("a", (10,), 4, a[4:7]), TensorPiece("b", (2, 3), 0, b[0]), *whole_pieces({"c": c})]
    write_ranks(tmp_path / "f", [first, second])
    return tmp_path / "f"


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_pieces_of_any_number_of_ranks_are_read_as_the_whole(tmp_path, n_ranks):
    tensors = wholes()
    write_ranks(tmp_path / "f", dealt(tensors, n_ranks, seed=n_ranks))
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]
    assert not list((tmp_path / "f").glob("*.part*"))
    found = open_folder(tmp_path / "f")
    assert set(found.names) == set(tensors)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found.document("state") == {"step": 7}
    together = found.tensors("m/")
    for name, expected in tensors.items():
        assert_same(found.tensor(name), expected)
        assert_same(together[name.removeprefix("m/")], expected)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_any_range_is_the_slice_of_the_whole(tmp_path, n_ranks):
    tensors = {"x": random_bits(torch.bfloat16, (3, 7), 1), "y": torch.tensor(5), "z": torch.zeros(2, 0)}
    write_ranks(tmp_path / "f", dealt(tensors, n_ranks, seed=5))
    found = open_folder(tmp_path / "f")
    for name, tensor in tensors.items():
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert_same(found.read_range(name, start, stop), tensor.reshape(-1)[start:stop])
        for start, stop in ((-1, 0), (1, 0), (0, tensor.numel() + 1)):
            with pytest.raises(ValueError, match=name):
                found.read_range(name, start, stop)


def test_neighbours_on_one_rank_are_stored_as_one(tmp_path):
    """However finely one rank alone cuts its tensors, it writes what `write_folder` does; two write two pieces each."""
    tensors = {name: tensor for name, tensor in wholes().items() if tensor.numel() > 1}
    (cut,) = dealt(tensors, 1)
    assert len(cut) > 2 * len(tensors)
    runs = join_pieces(cut)
    refuse_parts(runs)
    write_folder(tmp_path / "a", tensors, {})
    write_folder(tmp_path / "b", snapshot_of(runs), {})
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    flat = torch.arange(100)
    ranks = [[TensorPiece("x", (100,), i, flat[i : i + 5]) for i in range(r * 50, r * 50 + 50, 5)] for r in range(2)]
    write_ranks(tmp_path / "c", ranks)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_bytes())
    assert [(piece["start"], piece["elements"]) for piece in manifest["tensors"]["x"]["pieces"]] == [(0, 50), (50, 50)]


def test_equal_pieces_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        ranks = dealt(wholes(), 3)
        for pieces in ranks:
            random.Random(name).shuffle(pieces)
        write_ranks(tmp_path / name, ranks)
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_only_a_folder_with_pieces_is_of_the_version_that_has_them(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.ones(3)}
    write_ranks(tmp_path / "whole", [whole_pieces({name: tensor}) for name, tensor in tensors.items()])
    write_ranks(tmp_path / "cut", [[TensorPiece("a", (2,), i, tensors["a"][i : i + 1])] for i in range(2)])
    versions = [json.loads((tmp_path / name / "manifest.json").read_bytes())["version"] for name in ("whole", "cut")]
    assert versions == [1, 2]


def test_an_altered_byte_of_a_piece_is_refused_by_file_name(folder):
    files = sorted(folder.glob("rank-*.safetensors"))
    assert {file.name[:8] for file in files} == {"rank-000", "rank-001"}
    for file in files:
        content = file.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            altered = bytearray(content)
            altered[position] ^= 1
            file.write_bytes(altered)
            with pytest.raises(CorruptCheckpointError) as caught:
                open_folder(folder)
            assert caught.value.file == file.name
        file.unlink()
        with pytest.raises(CorruptCheckpointError, match=file.name):
            open_folder(folder, verify=False)
        file.write_bytes(content)
    open_folder(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pieces: pieces.pop(1), "elements 4 to 6 nowhere"),
        (lambda pieces: pieces.pop(), "elements 7 to 9 nowhere"),
        (lambda pieces: pieces.clear(), "elements 0 to 9 nowhere"),
        (lambda pieces: pieces.append(pieces[1]), "elements 4 to 6 twice"),
        (lambda pieces: pieces[0].update(elements=6), "elements 4 to 5 twice"),
        (lambda pieces: pieces[2].update(elements=4), "10 elements"),
        (lambda pieces: pieces[0].update(start=-1), "10 elements"),
    ],
)
def test_a_manifest_whose_pieces_are_not_every_element_once_is_refused_by_tensor(folder, change, problem):
    manifest = folder_json.unseal_manifest(folder, (folder / "manifest.json").read_bytes())
    change(manifest["tensors"]["a"]["pieces"])
    (folder / "manifest.json").write_bytes(folder_json.seal_manifest(manifest))
    with pytest.raises(CorruptCheckpointError, match=f"tensor 'a'.*{problem}") as caught:
        open_folder(folder)
    assert caught.value.file == "manifest.json"


def test_a_piece_that_is_not_as_the_manifest_says_is_refused(folder):
    manifest = folder_json.unseal_manifest(folder, (folder / "manifest.json").read_bytes())
    pieces = manifest["tensors"]["a"]["pieces"]
    pieces[0]["elements"], pieces[1]["start"], pieces[1]["elements"] = 3, 3, 4
    (folder / "manifest.json").write_bytes(folder_json.seal_manifest(manifest))
    with pytest.raises(CorruptCheckpointError, match="rank-000-tensors"):
        open_folder(folder).tensor("a")


def test_layout_against_counting():
    """Random ranges are a partition exactly if every element is counted once."""
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        total = rng.randrange(5)
        ranges = [tuple(sorted((rng.randrange(5), rng.randrange(5)))) for _ in range(rng.randrange(4))]
        counts = [sum(start <= element < stop for start, stop in ranges) for element in range(total)]
        sound = all(count == 1 for count in counts) and all(stop <= total for _, stop in ranges)
        assert (layout_problem((total,), ranges) is None) == sound
        seen.add((sound, len(ranges)))
    assert (True, 3) in seen


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([[(0, 3)], [(4, 6)]], "elements 3 to 3 nowhere"),
        ([[(0, 4)], [(3, 6)]], "elements 3 to 3 twice"),
        ([[(0, 6)], [(0, 6)]], "elements 0 to 5 twice"),
        ([[(0, 0)], [(2, 2)]], "elements 0 to 5 nowhere"),
    ],
)
def test_writers_that_do_not_hold_every_element_once_write_nothing(tmp_path, ranks, problem):
    flat = torch.arange(6)
    pieces = [[TensorPiece("x", (6,), first, flat[first:last]) for first, last in rank] for rank in ranks]
    with pytest.raises(InvalidEntryError, match=f"'x'.*{problem}"):
        write_ranks(tmp_path / "f", pieces)
    assert not (tmp_path / "f").exists()


def test_pieces_of_different_kinds_are_refused(tmp_path):
    flat = torch.arange(6)
    other = [TensorPiece("x", (2, 3), 3, flat[3:]), TensorPiece("x", (6,), 3, flat[3:].float())]
    for wrong in other:
        with pytest.raises(InvalidEntryError, match="'x'"):
            join_pieces([TensorPiece("x", (6,), 0, flat[:3]), wrong])
        with pytest.raises(InvalidEntryError, match="'x'"):
            write_ranks(tmp_path / "f", [[TensorPiece("x", (6,), 0, flat[:3])], [wrong]])
    with pytest.raises(InvalidEntryError, match="twice"):
        join_pieces([TensorPiece("x", (6,), 0, flat[:3]), TensorPiece("x", (6,), 2, flat[2:4])])
    with pytest.raises(InvalidEntryError, match="'x@3'"):
        plan_part(0, join_pieces([TensorPiece("x", (6,), 3, flat[3:]), *whole_pieces({"x@3": flat})]))
    for start, shape in ((-1, (6,)), (1, (6,)), (0, (5,))):
        with pytest.raises(InvalidEntryError, match="'x'"):
            TensorPiece("x", shape, start, flat)
    with pytest.raises(InvalidEntryError, match="'x'"):
        refuse_parts(join_pieces([TensorPiece("x", (6,), 0, flat[:0])]))


@pytest.mark.parametrize("n_readers", [1, 2, 3])
def test_readers_of_another_number_fill_their_pieces(tmp_path, n_readers):
    """Written in pieces by two, read in other pieces, in another dtype, by any number."""
    source = {name: torch.randn(shape) for name, shape in (("w", (6, 4)), ("v", (5,)), ("s", ()))}
    write_ranks(tmp_path / "f", dealt({f"m/{name}": tensor for name, tensor in source.items()}, 2, seed=3))
    found = open_folder(tmp_path / "f")
    targets = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in source.items()}
    for pieces in dealt(targets, n_readers, seed=n_readers):
        fill_pieces(found, "m/", pieces)
    for name, tensor in source.items():
        assert torch.equal(targets[name], tensor.bfloat16())
    transposed = torch.zeros(4, 6)
    fill_pieces(found, "m/", [*whole_pieces(source), TensorPiece("w", (6, 4), 0, transposed.T)])
    assert torch.equal(transposed, source["w"].T)


def test_a_mismatch_is_told_in_full_before_anything_is_filled(folder):
    target = torch.full((10,), 9.0)
    pieces = [
        TensorPiece("a", (10,), 0, target[:2]),
        TensorPiece("b", (6,), 0, torch.zeros(1)),
        TensorPiece("d", (6,), 0, torch.zeros(0)),
    ]
    with pytest.raises(WeightsMismatchError) as caught:
        fill_pieces(open_folder(folder), "", pieces)
    for problem in ("b of shape (2, 3), expected (6,)", "no tensor d", "a tensor c that"):
        assert problem in str(caught.value)
    assert torch.equal(target, torch.full((10,), 9.0))


def test_a_missing_part_is_named_at_the_deadline_and_nothing_half_written_is_a_part(tmp_path):
    temporary = begin_folder(tmp_path / "f", 0)
    runs = join_pieces(whole_pieces({"a": torch.ones(2)}))
    write_part(temporary, tmp_path / "f", 0, runs, snapshot_of(runs))
    (temporary / "rank-002-tensors-00001.safetensors").write_bytes(b"torn")
    (temporary / "rank-002.part.unfinished").write_bytes(b'{"fil')
    with pytest.raises(MissingPartsError, match="rank 1, 2 ") as caught:
        complete_folder(temporary, tmp_path / "f", 3, TEXTS, 0.1, never)
    assert caught.value.ranks == (1, 2)
    assert not (tmp_path / "f").exists()


def test_a_part_cut_short_is_no_part(tmp_path, monkeypatch):
    temporary = begin_folder(tmp_path / "f", 0)
    runs = join_pieces(whole_pieces({"a": torch.ones(2)}))

    def cut(path: Path, content: bytes) -> str:
        path.write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_parts, "write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        write_part(temporary, tmp_path / "f", 0, runs, snapshot_of(runs))
    monkeypatch.undo()
    with pytest.raises(MissingPartsError):
        complete_folder(temporary, tmp_path / "f", 1, TEXTS, 0.0, never)


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path):
    temporary = begin_folder(tmp_path / "f", 0)
    with pytest.raises(MissingPartsError) as caught:
        complete_folder(temporary, tmp_path / "f", 3, TEXTS, 600.0, lambda rank: rank == 2)
    assert caught.value.ranks == (2,)
    with pytest.raises(NotPublishedError, match="ended"):
        await_end(temporary, tmp_path / "f", 600.0, lambda rank: rank == 0)
    with pytest.raises(NotPublishedError, match="nothing"):
        await_end(temporary, tmp_path / "f", 0.1, never)


def test_a_failed_part_reaches_rank_0_and_its_reason_everybody(tmp_path):
    path = tmp_path / "f"
    write_folder(path, {"old": torch.ones(1)}, {})
    before = listing(path)
    temporary = begin_folder(path, 0)
    for rank in (0, 2):
        runs = join_pieces(whole_pieces({f"t{rank}": torch.ones(2)}))
        write_part(temporary, path, rank, runs, snapshot_of(runs))
    leave_failure(temporary, 1, OSError(errno.EIO, "bad block"))
    waiting = []

    def wait() -> None:
        with pytest.raises(NotPublishedError, match="bad block") as caught:
            await_end(temporary, path, 60.0, never)
        waiting.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    with pytest.raises(PartFailedError, match=r"rank 1: .*bad block") as caught:
        complete_folder(temporary, path, 3, TEXTS, 60.0, never)
    abandon_folder(temporary, path, caught.value)
    thread.join()
    assert len(waiting) == 1
    assert listing(path) == before
    assert not temporary.exists()
    leave_failure(temporary, 2, OSError("late"))  # too late to matter
    assert sum(len(list(entry.iterdir())) for entry in tmp_path.glob(".*")) == 1, "only the reason stays"
    clean_leftovers(tmp_path, writers_are_dead=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_what_is_at_the_place_is_replaced_if_it_is_a_folder(tmp_path):
    write_folder(tmp_path / "f", {"old": torch.ones(1)}, {})
    ranks = dealt({"new": torch.arange(9)}, 2)
    write_ranks(tmp_path / "f", ranks)
    assert open_folder(tmp_path / "f").names == ("new",)
    shutil.rmtree(tmp_path / "f")
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FolderExistsError):
        write_ranks(tmp_path / "f", ranks)
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.parametrize("failing", range(7))
def test_a_disk_that_fills_while_any_file_is_written_leaves_what_was_there(folder, monkeypatch, failing):
    before = listing(folder)
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file.os, "fsync", fsync)
    with pytest.raises(DiskSpaceError):
        # Synced: for each rank a file and its part; a document, the manifest, the folder.
        write_ranks(folder, [whole_pieces({f"t{rank}": torch.ones(2)}) for rank in range(2)])
    monkeypatch.undo()
    assert listing(folder) == before
