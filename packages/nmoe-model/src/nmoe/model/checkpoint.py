"""The tensor folder: named tensors and JSON documents on disk, whole or refused.

    <folder>/tensors-00001.safetensors …  tensors, in safetensors files of a bounded size
    <folder>/<name>.json …                documents
    <folder>/manifest.json                written last: each file's size and SHA-256; each tensor's file, dtype, shape

The folder is written under a temporary name beside its place, synced, and renamed: a folder of the final name is whole,
whatever moment the writer is killed at. Reading trusts nothing before its checksum: the manifest carries its own, and
is refused if any byte of it differs. No pickle; reading runs no code of the folder's.

One version of nmoe-model writes equal bytes for equal tensors and documents: nothing tells when or where.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from nmoe.model.errors import (
    CorruptCheckpointError,
    DiskSpaceError,
    FolderExistsError,
    IncompleteCheckpointError,
    MissingEntryError,
)
from nmoe.model.folder_json import MANIFEST, encode_document, seal_manifest, unseal_manifest
from nmoe.model.tensor_file import DTYPES, TensorFile, plan_files, run_parallel, write_bytes, write_tensors
from safetensors import SafetensorError, safe_open

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_HEADROOM = 1 << 20
"""Bytes that the manifest and the file system's own bookkeeping may take."""


def write_folder(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    documents: Mapping[str, Any],
    *,
    max_file_bytes: int = 2 << 30,
    replace: bool = False,
) -> None:
    """Writes a tensor folder at `path`, or nothing.

    Tensors are streamed from where they are, each file hashed as it is written, several files at a time; only a
    non-contiguous tensor is copied, while it is written. The caller must not change them before this returns.

    Args:
        path: Place of the folder; missing parents are made. One process at a time writes to one path.
        tensors: CPU tensors by name, of any shape (0-d and empty ones too) and any dtype in `tensor_file.DTYPES`.
        documents: JSON values by name, read back equal (tuples as lists). Mappings have string keys, floats are finite.
        max_file_bytes: Bytes of tensors after which a new file begins; a larger tensor has a file of its own.
        replace: Whether a folder at `path` may be replaced; it stays until the new one is whole and synced.

    Raises:
        InvalidEntryError: a tensor or document that the format cannot hold; nothing was written.
        FolderExistsError: there is something at `path` that `replace` does not allow to replace.
        DiskSpaceError: the disk has no room, seen before or while writing; what was written is removed.
    """
    files = plan_files(tensors, max_file_bytes)
    texts = {f"{name}.json": encode_document(name, value) for name, value in documents.items()}
    need = _need(files, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(path.parent, path.name)
    if os.path.lexists(path) and not (replace and path.is_dir()):
        raise FolderExistsError(path)
    _check_free(path, need)

    temporary = leftover_path(path, "tmp")
    temporary.mkdir()
    try:
        _write_files(temporary, tensors, files, texts)
        _publish(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(path, need, shutil.disk_usage(path.parent).free) from error
        raise


def check_space(path: Path, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, Any]) -> None:
    """Raises what `write_folder(path, tensors, documents)` would raise before it writes, but for an existing `path`.

    Reads no tensor's values, so that they may still be on any device.

    Raises:
        InvalidEntryError: a tensor or document that the format cannot hold.
        DiskSpaceError: the disk has no room for the folder.
    """
    texts = {f"{name}.json": encode_document(name, value) for name, value in documents.items()}
    _check_free(path, _need(plan_files(tensors), texts))


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
        if not writers_are_dead and _is_alive(int(match["pid"])):
            continue
        place = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(place):
            entry.rename(place)
        else:
            shutil.rmtree(entry)


def is_complete(path: Path) -> bool:
    """Whether `path` is a tensor folder whose writing ended. Its content may still have been altered since."""
    return (path / MANIFEST).is_file()


def open_folder(path: Path, *, verify: bool = True) -> "TensorFolder":
    """Opens a tensor folder for reading.

    Args:
        path: The folder.
        verify: Whether every file's SHA-256 is checked, which reads all of them (several at a time); sizes always are.

    Raises:
        IncompleteCheckpointError: no such folder, or one without a manifest.
        CorruptCheckpointError: a file is missing, cut short or altered; `.file` names it.
        CheckpointVersionError: written in a version of the format that this one cannot read.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteCheckpointError(path) from None
    manifest = unseal_manifest(path, raw)
    checks = [partial(_check_file, path, name, entry, verify) for name, entry in sorted(manifest["files"].items())]
    run_parallel(checks)
    return TensorFolder(path, manifest)


class TensorFolder:
    """A tensor folder open for reading. Obtained from `open_folder`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        """Where the folder is."""
        self._files: Mapping[str, Any] = manifest["files"]
        self._tensors: Mapping[str, Any] = manifest["tensors"]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, sorted."""
        return tuple(sorted(self._tensors))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name, as the manifest has them."""
        return {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}

    @property
    def document_names(self) -> tuple[str, ...]:
        """The documents' names, sorted."""
        return tuple(sorted(name.removesuffix(".json") for name in self._files if name.endswith(".json")))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, with the dtype and shape it was written with.

        Its memory is a private mapping of the file: pages are read when touched, and writing to the tensor leaves the
        file alone.

        Raises:
            MissingEntryError: the folder has no tensor of that name.
            CorruptCheckpointError: its file no longer holds it as the manifest says.
        """
        if name not in self._tensors:
            raise MissingEntryError(self.path, "tensor", name, self._tensors)
        return self._read([name])[name]

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, by their names without it. See `tensor`."""
        found = self._read([name for name in self.names if name.startswith(prefix)])
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def document(self, name: str) -> Any:
        """The JSON document `name`.

        Raises:
            MissingEntryError: the folder has no document of that name.
            CorruptCheckpointError: its file no longer holds JSON.
        """
        if name not in self.document_names:
            raise MissingEntryError(self.path, "document", name, self.document_names)
        file = f"{name}.json"
        try:
            return json.loads((self.path / file).read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptCheckpointError(self.path, file, f"expected a JSON document, found: {error}") from error

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._tensors[name]["file"], []).append(name)
        found = {}
        for file, members in by_file.items():
            try:
                with safe_open(self.path / file, framework="pt") as source:
                    for name in members:
                        found[name] = source.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CorruptCheckpointError(self.path, file, f"expected a safetensors file, found: {error}") from error
        for name, tensor in found.items():
            entry = self._tensors[name]
            expected, seen = (entry["dtype"], entry["shape"]), (DTYPES.get(tensor.dtype), list(tensor.shape))
            if seen != expected:
                problem = f"expected tensor {name!r} as {expected}, found {seen}"
                raise CorruptCheckpointError(self.path, entry["file"], problem)
        return {name: found[name] for name in names}


def _write_files(
    folder: Path, tensors: Mapping[str, torch.Tensor], files: list[TensorFile], texts: Mapping[str, bytes]
) -> None:
    tasks: dict[str, Callable[[], str]] = {
        file.name: partial(write_tensors, folder / file.name, file, tensors) for file in files
    }
    tasks |= {name: partial(write_bytes, folder / name, text) for name, text in texts.items()}
    digests = dict(zip(tasks, run_parallel(list(tasks.values())), strict=True))
    sizes = {file.name: file.size for file in files} | {name: len(text) for name, text in texts.items()}
    manifest = {
        "tool": _tool(),
        "files": {name: {"bytes": sizes[name], "sha256": digest} for name, digest in digests.items()},
        "tensors": {
            name: {"file": file.name, "dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
            for file in files
            for name in file.members
        },
    }
    write_bytes(folder / MANIFEST, seal_manifest(manifest))
    _sync_folder(folder)


def _publish(temporary: Path, path: Path) -> None:
    aside = leftover_path(path, "old")
    # A folder cannot be renamed over another. Between the two renames a kill leaves none: `clean_leftovers` then undoes
    # the first.
    if os.path.lexists(path):
        path.rename(aside)
    temporary.rename(path)
    _sync_folder(path.parent)
    if os.path.lexists(aside):
        shutil.rmtree(aside)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _need(files: list[TensorFile], texts: Mapping[str, bytes]) -> int:
    entries = sum(len(file.members) for file in files) * 512
    return sum(file.size for file in files) + sum(map(len, texts.values())) + entries + _HEADROOM


def _check_free(path: Path, need: int) -> None:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise DiskSpaceError(path, need, free)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        # Left by a dead process that had our number, as in a restarted container: we have not begun to write.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    if Path(name).name != name:
        raise CorruptCheckpointError(folder, MANIFEST, f"expected names of files in the folder, found {name!r}")
    try:
        with open(folder / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                raise CorruptCheckpointError(folder, name, f"expected {entry['bytes']} bytes, found {size}")
            if verify and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise CorruptCheckpointError(
                    folder, name, "expected the content that was written, found an altered one"
                )
    except (FileNotFoundError, IsADirectoryError):
        raise CorruptCheckpointError(folder, name, "expected a file, found none") from None


def _tool() -> str:
    """What writes, with its version; a source tree on the path has none."""
    try:
        return f"nmoe-model {version('nmoe-model')}"
    except PackageNotFoundError:
        return "nmoe-model from source"
