"""The tensor folder: named tensors and JSON documents on disk, whole or refused.

    <folder>/tensors-00001.safetensors …  tensors, in safetensors files of a bounded size
    <folder>/<name>.json …                documents
    <folder>/manifest.json                written last: each file's size and SHA-256; each tensor's file, dtype, shape

The folder is written under a temporary name beside its place, synced, and renamed: a folder of the final name is whole,
whatever moment the writer is killed at. Reading trusts nothing before its checksum: the manifest carries its own, and
is refused if any byte of it differs. No pickle; reading runs no code of the folder's.

One version of nmoe-model writes equal bytes for equal tensors and documents: nothing tells when or where.

Several processes write one folder together with `nmoe.model.folder_parts`: then a tensor may be stored in pieces, which
reading joins, so that nobody needs to know how many wrote.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from nmoe.model.errors import CorruptCheckpointError, FolderExistsError, IncompleteCheckpointError, MissingEntryError
from nmoe.model.folder_json import MANIFEST, encode_documents, unseal_manifest
from nmoe.model.folder_place import (
    check_free,
    clean_leftovers,
    end_folder,
    leftover_path,
    space_needed,
    telling_full_disk,
)
from nmoe.model.stored_tensors import StoredTensors, check_entry
from nmoe.model.tensor_file import DTYPES, plan_files, run_parallel, write_files


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
    texts = encode_documents(documents)
    need = space_needed(files, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(path.parent, path.name)
    if os.path.lexists(path) and not (replace and path.is_dir()):
        raise FolderExistsError(path)
    check_free(path, need)

    temporary = leftover_path(path, "tmp")
    temporary.mkdir()
    with telling_full_disk(path, need):
        try:
            entries = write_files(temporary, files, tensors, texts)
            places = {
                name: {"file": file.name, "dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape)}
                for file in files
                for name in file.members
            }
            end_folder(temporary, path, entries, places)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_space(path: Path, tensors: Mapping[str, torch.Tensor], documents: Mapping[str, Any]) -> None:
    """Raises what `write_folder(path, tensors, documents)` would raise before it writes, but for an existing `path`.

    Reads no tensor's values, so that they may still be on any device.

    Raises:
        InvalidEntryError: a tensor or document that the format cannot hold.
        DiskSpaceError: the disk has no room for the folder.
    """
    check_free(path, space_needed(plan_files(tensors), encode_documents(documents)))


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
    for name, entry in sorted(manifest["tensors"].items()):
        check_entry(path, MANIFEST, name, entry)
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
        file alone. A tensor in pieces is copied together.

        Raises:
            MissingEntryError: the folder has no tensor of that name.
            CorruptCheckpointError: its file no longer holds it as the manifest says.
        """
        return self._read([self._known(name)])[name]

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, by their names without it. See `tensor`."""
        found = self._read([name for name in self.names if name.startswith(prefix)])
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The elements `start` to `stop - 1` of the flattened tensor `name`, 1-D, on the CPU, of the stored dtype.

        Reads no others. See `tensor` for the memory: that of a range within one piece is a mapping.

        Raises:
            MissingEntryError, CorruptCheckpointError: as `tensor`.
            ValueError: the tensor has no such range.
        """
        total = prod(self._tensors[self._known(name)]["shape"])
        if not 0 <= start <= stop <= total:
            raise ValueError(f"tensor {name!r}: expected a range of its {total} elements, found {start} to {stop}")
        with StoredTensors(self.path) as stored:
            return stored.read_range(name, self._tensors[name], start, stop)

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

    def _known(self, name: str) -> str:
        if name not in self._tensors:
            raise MissingEntryError(self.path, "tensor", name, self._tensors)
        return name

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        with StoredTensors(self.path) as stored:
            return {
                name: stored.read_range(name, entry, 0, prod(entry["shape"])).view(entry["shape"])
                for name in names
                for entry in [self._tensors[name]]
            }


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
