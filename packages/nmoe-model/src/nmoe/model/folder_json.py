"""The JSON side of the tensor folder: documents that read back equal, and a manifest that refuses any altered byte."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmoe.model.errors import CheckpointVersionError, CorruptCheckpointError, InvalidEntryError

MANIFEST = "manifest.json"
FORMAT = "nmoe-tensor-folder"
WHOLE, PIECES = 1, 2
"""Versions: every tensor in one file, as a whole; and some in pieces. A reader of version 1 knows no pieces."""

_DOCUMENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def encode_document(name: str, value: Any) -> bytes:
    """The content of the file `<name>.json` for a JSON value.

    Raises:
        InvalidEntryError: the name cannot be a file's, or the value would not read back equal (tuples apart, which
            read back as lists).
    """
    if f"{name}.json" == MANIFEST or not _DOCUMENT_NAME.fullmatch(name):
        raise InvalidEntryError(
            f"document {name!r}: expected a name of letters, digits, '_', '-' and '.', other than 'manifest'; rename it"
        )
    _check_json(name, value)
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


def encode_documents(documents: Mapping[str, Any]) -> dict[str, bytes]:
    """The documents' files by name. See `encode_document`."""
    return {f"{name}.json": encode_document(name, value) for name, value in documents.items()}


def seal_manifest(content: Mapping[str, Any]) -> bytes:
    """The manifest's file: `format` and `version` are added, and the SHA-256 of all the rest."""
    in_pieces = any("pieces" in entry for entry in content["tensors"].values())
    return _dump(_with_digest({**content, "format": FORMAT, "version": PIECES if in_pieces else WHOLE}))


def unseal_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    """What `seal_manifest` was given.

    Args:
        path: The folder, for the errors.
        raw: The manifest file's content.

    Raises:
        CorruptCheckpointError: any byte differs from what was written, or the file is none of ours.
        CheckpointVersionError: an intact manifest of another version.
    """
    try:
        content = json.loads(raw)
        content.pop("sha256", None)
        # Compared as bytes, so that even a changed space is refused.
        intact = _dump(_with_digest(content)) == raw
    except (ValueError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CorruptCheckpointError(path, MANIFEST, "expected a manifest as it was written, found an altered one")
    written_as = content.pop("format", None), content.pop("version", None)
    if written_as not in ((FORMAT, WHOLE), (FORMAT, PIECES)):
        found = " ".join(map(str, written_as))
        raise CheckpointVersionError(path, found, f"{FORMAT} {PIECES}", str(content.get("tool")))
    return content


def _with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**content, "sha256": hashlib.sha256(_dump(content)).hexdigest()}


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _check_json(where: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidEntryError(f"document {where}: expected string keys, found {key!r}: JSON has no others")
            _check_json(f"{where}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(f"{where}[{index}]", item)
    elif isinstance(value, float) and value - value != 0:
        raise InvalidEntryError(f"document {where}: expected a finite number, found {value}: JSON has no others")
    elif not isinstance(value, str | int | float | None):
        raise InvalidEntryError(f"document {where}: expected a JSON value, found a {type(value).__name__}: convert it")
