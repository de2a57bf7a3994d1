"""Where a folder is written before it is whole, the room that it needs, and how it gets to its place."""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nmoe.model.errors import DiskSpaceError
from nmoe.model.folder_json import MANIFEST, seal_manifest
from nmoe.model.tensor_file import TensorFile, write_bytes

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_HEADROOM = 1 << 20
"""Bytes that the manifest and the file system's own bookkeeping may take."""


def leftover_path(path: Path, kind: str) -> Path:
    """The hidden name beside `path` that marks this process's garbage: `tmp`, or `old` for what is being replaced."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def clean_leftovers(folder: Path, name: str | None = None, *, writers_are_dead: bool = False) -> None:
    """Removes what killed writers left in `folder` under temporary names.

    A folder that was moved aside by a writer killed just before it put the new one in place is moved back.

    Args:
        folder: The parent of tensor folders; it may be missing.
        name: The tensor folder whose leftovers to remove; absent: all.
        writers_are_dead: The caller knows that nobody else writes here. Else a leftover is spared while a process of
            its writer's number lives, which may be another one by now.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or not entry.is_dir() or name not in (None, match["name"]):
            continue
        # Left by a dead process that had our number, as in a restarted container: we have not begun to write.
        if not writers_are_dead and int(match["pid"]) != os.getpid() and is_alive(int(match["pid"])):
            continue
        place = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(place):
            entry.rename(place)
        else:
            shutil.rmtree(entry)


def end_folder(temporary: Path, path: Path, files: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder whose files are all there, and puts the folder in its place.

    Args:
        temporary: The folder.
        path: Its place; a folder that is there is replaced.
        files: By name, as `tensor_file.write_files` tells them.
        tensors: By name: dtype, shape, and the file, or the pieces.
    """
    write_bytes(temporary / MANIFEST, seal_manifest({"tool": _tool(), "files": files, "tensors": tensors}))
    sync_folder(temporary)
    aside = leftover_path(path, "old")
    # A folder cannot be renamed over another. Between the two renames a kill leaves none: `clean_leftovers` then undoes
    # the first.
    if os.path.lexists(path):
        path.rename(aside)
    temporary.rename(path)
    sync_folder(path.parent)
    if os.path.lexists(aside):
        shutil.rmtree(aside)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder lasting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def space_needed(files: Iterable[TensorFile], texts: Mapping[str, bytes]) -> int:
    """Bytes that a folder of these files takes at most."""
    return sum(file.size + len(file.members) * 512 for file in files) + sum(map(len, texts.values())) + _HEADROOM


def free_space(path: Path) -> int:
    """Bytes that are free on the disk where `path` is, or would be."""
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    return shutil.disk_usage(parent).free


def check_free(path: Path, need: int) -> None:
    """Raises DiskSpaceError if the disk of `path` has not room for `need` bytes."""
    free = free_space(path)
    if free < need:
        raise DiskSpaceError(path, need, free)


@contextmanager
def telling_full_disk(path: Path, need: int) -> Iterator[None]:
    """Raises DiskSpaceError where the block finds the disk full after all."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(path, need, shutil.disk_usage(path.parent).free) from error
        raise


def is_alive(pid: int) -> bool:
    """Whether a process of that number is on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tool() -> str:
    """What writes, with its version; a source tree on the path has none."""
    try:
        return f"nmoe-model {version('nmoe-model')}"
    except PackageNotFoundError:
        return "nmoe-model from source"
