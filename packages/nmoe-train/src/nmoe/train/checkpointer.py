"""A run's checkpoints: written in the background, pruned, found and opened.

    <folder>/step_XXXXXXXX    a tensor folder (see nmoe.model.checkpoint) of the state after so many steps

A name that begins with a dot belongs to a write or a removal that has not ended, and is nobody's checkpoint.
"""

import re
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
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
from nmoe.model.errors import CheckpointError
from nmoe.train.errors import CheckpointWriteError, RefusedCheckpointError

_NAME = re.compile(r"step_(\d{8,})")


class Checkpointer:
    """Writes a run's checkpoints. The only writer of its folder: the run's lock sees to that.

    Leftovers of a killed writer are removed when it is made.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None) -> None:
        """Prepares to write.

        Args:
            folder: Where the checkpoints are; made at the first write.
            keep: The newest so many stay, at least one.
            keep_every: Checkpoints at multiples of so many steps stay for ever; absent: none does.
        """
        self.folder = folder
        self._keep = keep
        self._keep_every = keep_every
        self._snapshot: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None  # of the last write
        self._untold: deque[Exception] = deque()  # of any write, made good since or not; not yet asked for
        clean_leftovers(folder, writers_are_dead=True)  # the run's lock keeps others out

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step_{step:08}"

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, Any]) -> None:
        """Copies the state to host memory and begins to write it at `path(step)`.

        On return tensors and documents may change again. The copy's memory is kept for the next save: one host copy of
        the state, no more. An earlier write is waited for first. A checkpoint of the same step is replaced, once the
        new one is whole. When the write is done, old checkpoints are removed. If an earlier write failed, this one is
        made all the same, and makes that good; `failure` tells it.

        Args:
            step: Steps that the state has seen.
            tensors: The state, on any device; read on its current stream.
            documents: JSON values, see `nmoe.model.checkpoint.write_folder`.

        Raises:
            nmoe.model.errors.CheckpointError: the disk has no room now, or the format cannot hold an entry.
        """
        self._join()
        path = self.path(step)
        check_space(path, tensors, documents)
        self._snapshot = {name: self._to_host(name, tensor) for name, tensor in tensors.items()}
        # No daemon: a process that ends on an error still finishes the checkpoint it began.
        self._thread = threading.Thread(
            target=self._write, args=(path, self._snapshot, deepcopy(dict(documents))), name=f"checkpoint-{step}"
        )
        self._thread.start()

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
        """Removes all checkpoints of later steps, complete or not: a run that goes on from `step` will write others."""
        self.wait()
        for found, path in _steps(self.folder):
            if found > step:
                _remove(path)

    def _to_host(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._snapshot.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return buffer.copy_(tensor.detach())

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, Any]) -> None:
        try:
            write_folder(path, tensors, documents, replace=True)
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
            if self._keep_every is None or step_of(path) % self._keep_every:
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
