"""One tensor folder written by several processes, which speak to each other by files in its temporary folder alone.

    .<name>.tmp-<pid>/rank-001-tensors-00001.safetensors …   tensors, whole or in pieces
    .<name>.tmp-<pid>/rank-001.part                          this rank is done: its files and their tensors, or an error

Rank 0 makes the temporary folder before the others write. It waits for all parts, merges them into the manifest, and
puts the folder in its place, or away. The others wait for either. So nobody needs a collective, which a background
thread could only call in another order than the main one; and a rank that dies at any moment leaves a temporary folder.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from nmoe.model.errors import CheckpointError, FolderExistsError, InvalidEntryError
from nmoe.model.folder_place import check_free, clean_leftovers, end_folder, leftover_path, telling_full_disk
from nmoe.model.tensor_file import DTYPES, TensorFile, plan_files, write_bytes, write_files
from nmoe.model.tensor_pieces import Run, layout_problem

_POLL_S = 0.05
_REASON = "reason.txt"

IsDead = Callable[[int], bool]
"""Whether a rank is known to have ended. A rank that nobody knows about is not dead."""


class MissingPartsError(CheckpointError):
    """Ranks did not write their part of a folder in time, or have ended without it."""

    def __init__(self, path: Path, missing: Sequence[int], n_ranks: int, waited_s: float) -> None:
        self.path = path
        self.ranks = tuple(missing)
        super().__init__(
            f"{path}: expected the parts of {n_ranks} ranks, found none of rank {', '.join(map(str, missing))} after "
            f"{waited_s:.0f} s. See what those ranks said last; all ranks must see one file system"
        )


class PartFailedError(CheckpointError):
    """Other ranks could not write their part of a folder."""

    def __init__(self, path: Path, reasons: Mapping[int, str]) -> None:
        self.path = path
        self.ranks = tuple(sorted(reasons))
        found = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))
        super().__init__(f"{path}: expected every rank to write its part, found {found}. Mend that, and save again")


class NotPublishedError(CheckpointError):
    """This rank wrote its part, but rank 0 did not make the folder whole."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: expected rank 0 to complete the folder, found {reason}. Mend that, and save again")


def begin_folder(path: Path, need: int) -> Path:
    """Rank 0's beginning: makes the temporary folder, and returns it.

    All that killed writers left beside `path` is removed: the caller knows that nobody else writes there.

    Raises:
        FolderExistsError: there is something at `path` that is no folder.
        DiskSpaceError: the disk has no room for `need` bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(path.parent, writers_are_dead=True)
    if os.path.lexists(path) and not path.is_dir():
        raise FolderExistsError(path)
    check_free(path, need)
    temporary = leftover_path(path, "tmp")
    temporary.mkdir()
    return temporary


def plan_part(rank: int, runs: Iterable[Run]) -> list[TensorFile]:
    """The files in which a rank writes its runs.

    Raises:
        InvalidEntryError: a tensor's name is none that safetensors can hold, or is the name of another's piece.
    """
    blanks: dict[str, torch.Tensor] = {}
    for run in runs:
        if not run.is_stored:
            continue
        if run.key in blanks:
            raise InvalidEntryError(f"tensor {run.key!r}: expected no other of the name, found two: rename it")
        blanks[run.key] = run.blank("meta")
    return [replace(plan, name=f"rank-{rank:03}-{plan.name}") for plan in plan_files(blanks)]


def write_part(
    temporary: Path, path: Path, rank: int, runs: Sequence[Run], snapshot: Mapping[str, torch.Tensor]
) -> None:
    """Writes a rank's files, and last, synced, that it is done.

    Args:
        temporary: Where rank 0 waits for it.
        path: The folder's place, for errors.
        rank: This one.
        runs: What it writes.
        snapshot: Their elements by `Run.key`, in the shape of `Run.blank`, on the CPU.

    Raises:
        DiskSpaceError: the disk is full.
        OSError: the disk fails, or rank 0 has put the folder away.
    """
    plans = plan_part(rank, runs)
    file_of = {key: plan.name for plan in plans for key in plan.members}
    with telling_full_disk(path, sum(plan.size for plan in plans)):
        files = write_files(temporary, plans, snapshot, {})
        pieces = [
            {
                "name": run.name,
                "dtype": DTYPES[run.dtype],
                "shape": list(run.shape),
                "file": file_of.get(run.key),  # none if it has no element
                "start": run.start,
                "elements": run.elements,
            }
            for run in runs
        ]
        _leave_part(temporary, rank, {"files": files, "pieces": pieces})


def leave_failure(temporary: Path, rank: int, error: BaseException) -> None:
    """Tells rank 0 that this rank's part will not come, if the disk lets it."""
    with suppress(OSError):
        for file in temporary.glob(f"rank-{rank:03}[-.]*"):
            file.unlink()  # makes room for the message on a full disk
        _leave_part(temporary, rank, {"error": f"{type(error).__name__}: {error}"})


def complete_folder(
    temporary: Path, path: Path, n_ranks: int, texts: Mapping[str, bytes], timeout_s: float, is_dead: IsDead
) -> None:
    """Rank 0's end of it: waits for all parts, then makes the folder whole and puts it in its place.

    Args:
        temporary: The folder that all ranks write in.
        path: Its place; what is there is replaced.
        n_ranks: Ranks, this one's part included.
        texts: The documents' files.
        timeout_s: How long to wait for the other parts.
        is_dead: Ranks that are not waited for.

    Raises:
        MissingPartsError: parts did not come.
        PartFailedError: other ranks could not write theirs.
        InvalidEntryError: the pieces of a tensor are not each of its elements once, or of one shape and dtype.
        DiskSpaceError: the disk is full.
    """
    parts = _await_parts(temporary, path, n_ranks, timeout_s, is_dead)
    reasons = {rank: part["error"] for rank, part in enumerate(parts) if "error" in part}
    if reasons:
        raise PartFailedError(path, reasons)
    tensors = _merge([piece for part in parts for piece in part["pieces"]])
    with telling_full_disk(path, sum(map(len, texts.values()))):
        files = write_files(temporary, [], {}, texts)
        for part in parts:
            files |= part["files"]
        for rank in range(n_ranks):
            (temporary / _part_name(rank)).unlink()
        end_folder(temporary, path, files, tensors)


def abandon_folder(temporary: Path, path: Path, error: BaseException) -> None:
    """Rank 0's other end of it: nothing comes of the folder, and the other ranks are told why.

    What stays is a small leftover, for the others to read; `clean_leftovers` removes it.
    """
    with suppress(OSError):
        (temporary / _REASON).write_text(f"{type(error).__name__}: {error}")
    # Away with the name first: whoever still writes there finds no folder any more.
    with suppress(OSError):
        away = temporary.rename(_away(temporary, path))
        for file in away.iterdir():
            if file.name != _REASON:
                file.unlink()


def await_end(temporary: Path, path: Path, timeout_s: float, is_dead: IsDead) -> None:
    """Any other rank's end of it: returns once rank 0 has put the folder in its place.

    Args:
        temporary: The folder that all ranks write in.
        path: Its place.
        timeout_s: How long to wait for rank 0.
        is_dead: Whether rank 0 has ended.

    Raises:
        NotPublishedError: rank 0 gave it up, or has not ended it in time.
    """
    begun = time.monotonic()
    while True:
        late = time.monotonic() - begun > timeout_s
        dead = is_dead(0)  # before the look: it may have ended with its work done
        if not temporary.exists():
            break
        if dead or late:
            raise NotPublishedError(path, "that it has ended" if dead else f"nothing of it after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    away = _away(temporary, path)
    if away.exists():
        reason = away / _REASON
        raise NotPublishedError(path, reason.read_text() if reason.exists() else "that it gave up")


def _away(temporary: Path, path: Path) -> Path:
    """Where rank 0 puts a folder that it gives up; a leftover as `clean_leftovers` knows them."""
    return temporary.with_name(temporary.name.replace(f".{path.name}.tmp-", f".{path.name}.failed.tmp-", 1))


def _part_name(rank: int) -> str:
    # Of no document: their files end in .json.
    return f"rank-{rank:03}.part"


def _leave_part(temporary: Path, rank: int, content: Mapping[str, Any]) -> None:
    # Renamed once synced: there is no part that is half written.
    unfinished = temporary / f"{_part_name(rank)}.unfinished"
    write_bytes(unfinished, json.dumps(content).encode())
    unfinished.rename(temporary / _part_name(rank))


def _await_parts(
    temporary: Path, path: Path, n_ranks: int, timeout_s: float, is_dead: IsDead
) -> list[Mapping[str, Any]]:
    begun = time.monotonic()
    while True:
        waited = time.monotonic() - begun
        dead = {rank for rank in range(n_ranks) if is_dead(rank)}  # before the look: they may have ended when done
        missing = [rank for rank in range(n_ranks) if not (temporary / _part_name(rank)).exists()]
        if not missing:
            return [json.loads((temporary / _part_name(rank)).read_bytes()) for rank in range(n_ranks)]
        if waited > timeout_s or dead.intersection(missing):
            raise MissingPartsError(path, missing if waited > timeout_s else sorted(dead & {*missing}), n_ranks, waited)
        time.sleep(_POLL_S)


def _merge(pieces: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tensors' entries in the manifest."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for piece in pieces:
        by_name.setdefault(piece["name"], []).append(piece)
    tensors: dict[str, dict[str, Any]] = {}
    for name, held in by_name.items():
        kind = {"dtype": held[0]["dtype"], "shape": held[0]["shape"]}
        for piece in held:
            other = {"dtype": piece["dtype"], "shape": piece["shape"]}
            if other != kind:
                raise InvalidEntryError(f"tensor {name!r}: expected pieces of one kind, found {kind} and {other}")
        problem = layout_problem(
            kind["shape"], [(piece["start"], piece["start"] + piece["elements"]) for piece in held]
        )
        if problem is not None:
            raise InvalidEntryError(f"tensor {name!r}: {problem}: give each element on one rank, once")
        stored = sorted((piece for piece in held if piece["file"] is not None), key=lambda piece: piece["start"])
        if stored[0]["elements"] == prod(kind["shape"]):
            tensors[name] = {**kind, "file": stored[0]["file"]}
        else:
            places = [{key: piece[key] for key in ("file", "start", "elements")} for piece in stored]
            tensors[name] = {**kind, "pieces": places}
    return tensors
