"""A run's checkpoints: written in the background, pruned, found and opened.

    <folder>/step_XXXXXXXX    a tensor folder (see nmoe.model.checkpoint) of the state after so many steps

Several ranks write one checkpoint together, each the pieces that it holds; any number of ranks reads it.

A name that begins with a dot belongs to a write or a removal that has not ended, and is nobody's checkpoint.
"""

import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nmoe.model.checkpoint import (
    TensorFolder,
    check_space,
    clean_leftovers,
    is_complete,
    leftover_path,
    open_folder,
    write_folder,
)
from nmoe.model.errors import CheckpointError, DiskSpaceError
from nmoe.model.folder_json import encode_documents
from nmoe.model.folder_parts import plan_part
from nmoe.model.folder_place import free_space, space_needed
from nmoe.model.tensor_pieces import Run, TensorPiece, join_pieces, refuse_parts, whole_pieces
from nmoe.rdep.world import World, alone
from nmoe.train.errors import CheckpointWriteError, RefusedCheckpointError
from nmoe.train.rank_write import RankWrite

_NAME = re.compile(r"step_(\d{8,})")


class Checkpointer:
    """Writes a run's checkpoints. The run's ranks are the only writers of its folder: the run's lock sees to that.

    Every rank has one and calls `save` in lockstep. Rank 0's cleans up, publishes and prunes. Leftovers of a killed
    writer are removed when it is made.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        *,
        world: World | None = None,
        parts_timeout_s: float = 1800.0,
    ) -> None:
        """Prepares to write.

        Args:
            folder: Where the checkpoints are, the same for all ranks; made at the first write.
            keep: The newest so many stay, at least one.
            keep_every: Checkpoints at multiples of so many steps stay for ever; absent: none does.
            world: The ranks; absent: this process is alone. One checkpointer a folder and world.
            parts_timeout_s: How long rank 0 waits for the other ranks' parts once its own is written. On one host, a
                rank that has ended is not waited for.
        """
        self.folder = folder
        self._keep = keep
        self._keep_every = keep_every
        self._world = alone("cpu") if world is None else world
        self._parts_timeout_s = parts_timeout_s
        self._saves = 0
        self._snapshot: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None  # of the last write
        self._untold: deque[Exception] = deque()  # of any write, made good since or not; not yet asked for
        if self._world.rank == 0:
            clean_leftovers(folder, writers_are_dead=True)  # the run's lock keeps others out

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step_{step:08}"

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor] | Iterable[TensorPiece], documents: Mapping[str, Any]
    ) -> None:
        """Copies the state to host memory and begins to write it at `path(step)`. All ranks call it in lockstep.

        On return tensors and documents may change again. The copy's memory is kept for the next save: one host copy of
        the state, no more. An earlier write is waited for first. A checkpoint of the same step is replaced, once the
        new one is whole. When the write is done, old checkpoints are removed. If an earlier write failed, this one is
        made all the same, and makes that good; `failure` tells it.

        Args:
            step: Steps that the state has seen.
            tensors: The state, on any device; read on its current stream. Whole tensors by name, or what this rank
                holds: over all ranks, every element of a tensor once. A piece without elements is not stored.
            documents: JSON values, see `nmoe.model.checkpoint.write_folder`. Rank 0's are written.

        Raises:
            nmoe.model.errors.CheckpointError: the disk has no room now, or the format cannot hold an entry. If it is
                raised on one rank it is raised on all.
        """
        self._join()
        path = self.path(step)
        pieces = whole_pieces(tensors) if isinstance(tensors, Mapping) else tensors
        # No daemon: a process that ends on an error still finishes the checkpoint it began.
        self._thread = threading.Thread(
            target=self._write, args=(path, self._begin(path, pieces, documents)), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def check_room(
        self, pieces: Iterable[TensorPiece], documents: Mapping[str, Any], to_come: Iterable[int]
    ) -> tuple[int, int]:
        """Refuses what its disk cannot hold, before it is there to be saved. All ranks call it in lockstep.

        Args:
            pieces: As `save` takes them.
            documents: Likewise.
            to_come: The steps that will be saved, in order.

        Returns:
            How many such checkpoints can stand in the folder, and how many will at once: those that stay, and the one
            that is being written.

        Raises:
            nmoe.model.errors.CheckpointError: the disk has no room for one more, or the format cannot hold an entry.
        """
        own = space_needed(plan_part(self._world.rank, join_pieces(pieces)), encode_documents(documents))
        need = sum(map(int, self._world.share("bytes of a checkpoint", str(own).encode())))
        there = [step for step, path in _steps(self.folder) if is_complete(path)]
        found = json.dumps([free_space(self.folder), there]).encode()
        free, there = json.loads(self._world.share("room for a checkpoint", found)[0])  # as rank 0 finds it
        if free < need:
            raise DiskSpaceError(self.folder, need, free)
        return free // need + len(there), self._most_at_once(there, to_come)

    def _most_at_once(self, there: Sequence[int], to_come: Iterable[int]) -> int:
        newest, lasting, most = deque[int](), 0, len(there)
        for number, step in enumerate((*there, *to_come), 1):
            standing = number if number <= len(there) + 1 else lasting + len(newest) + 1
            most = max(most, standing)
            newest.append(step)
            if len(newest) > self._keep:
                lasting += self._lasts(newest.popleft())
        return most

    def _lasts(self, step: int) -> bool:
        return self._keep_every is not None and step % self._keep_every == 0

    def wait(self) -> None:
        """Returns once nothing is being written. What it raises, `failure` no longer tells.

        Raises:
            CheckpointWriteError: the last write failed, whether `failure` told it or not; raised once.
            nmoe.model.errors.CheckpointError: it failed for the disk's room.
        """
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            with suppress(ValueError):
                self._untold.remove(failure)
            raise failure

    def failure(self) -> Exception | None:
        """Why a write that has ended failed, each told once, the oldest first; None if there is none to tell.

        Waits for nothing. A failure that a later write made good is told too.
        """
        return self._untold.popleft() if self._untold else None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def drop_after(self, step: int) -> None:
        """Removes all checkpoints of later steps, complete or not: a run that goes on from `step` will write others.

        On rank 0; on the others it only waits.
        """
        self.wait()
        if self._world.rank > 0:
            return
        for found, path in _steps(self.folder):
            if found > step:
                _remove(path)

    def _begin(self, path: Path, pieces: Iterable[TensorPiece], documents: Mapping[str, Any]) -> Callable[[], None]:
        """Refuses what cannot be written, copies the state, and returns what writes the copy."""
        if self._world.size == 1:
            runs = join_pieces(pieces)
            refuse_parts(runs)
            check_space(path, {run.name: run.blank("meta") for run in runs}, documents)
            self._copy_to_host(runs)
            return partial(write_folder, path, self._snapshot, deepcopy(dict(documents)), replace=True)
        self._saves += 1
        name = f"{path.name}/{self._saves}"
        write = RankWrite.agree(self._world, name, path, pieces, documents, self._parts_timeout_s)
        try:
            self._copy_to_host(write.runs)
        except BaseException as error:
            write.fail(error)
            raise
        return partial(write.write, self._snapshot)

    def _copy_to_host(self, runs: Iterable[Run]) -> None:
        buffers = {}
        for run in runs:
            if run.is_stored:
                buffers[run.key] = self._buffer(run)
                run.copy_to(buffers[run.key])
        self._snapshot = buffers

    def _buffer(self, run: Run) -> torch.Tensor:
        known, blank = self._snapshot.get(run.key), run.blank("meta")
        if known is not None and known.shape == blank.shape and known.dtype == blank.dtype:
            return known
        return run.blank("cpu")

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
            if self._world.rank == 0:
                self._prune()
        except CheckpointError as error:
            self._note(error)
        except Exception as error:
            failure = CheckpointWriteError(path, error)
            failure.__cause__ = error
            self._note(failure)
        else:
            self._failure = None

    def _note(self, failure: Exception) -> None:
        self._failure = failure
        self._untold.append(failure)

    def _prune(self) -> None:
        complete = list_complete(self.folder)
        for path in complete[: -self._keep]:
            if not self._lasts(step_of(path)):
                _remove(path)


def list_complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder` whose writing ended, oldest first. Their content may have been altered since."""
    return [path for _, path in _steps(folder) if is_complete(path)]


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint of the latest step in `folder` whose writing ended; `None` if there is none."""
    complete = list_complete(folder)
    return complete[-1] if complete else None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: expected a checkpoint's name, step_XXXXXXXX, found {path.name!r}")
    return int(match[1])


def load(path: Path) -> TensorFolder:
    """Opens a checkpoint after checking every file of it.

    Raises:
        RefusedCheckpointError: it is missing, torn or altered; the error names the file, and offers the newest complete
            older checkpoint beside it.
    """
    try:
        return open_folder(path)
    except CheckpointError as error:
        raise RefusedCheckpointError(path, error, _newest_sound_before(path)) from error


def _newest_sound_before(path: Path) -> Path | None:
    if _NAME.fullmatch(path.name) is None:
        return None
    older = [other for other in list_complete(path.parent) if step_of(other) < step_of(path)]
    for other in reversed(older):
        try:
            # Sizes only: what is offered is verified when it is taken.
            open_folder(other, verify=False)
        except CheckpointError:
            continue
        return other
    return None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((step_of(path), path) for path in entries if _NAME.fullmatch(path.name) and path.is_dir())


def _remove(path: Path) -> None:
    # Renamed first: a kill during the removal must not leave a folder that looks complete.
    leaving = leftover_path(path, "tmp")
    path.rename(leaving)
    shutil.rmtree(leaving)
