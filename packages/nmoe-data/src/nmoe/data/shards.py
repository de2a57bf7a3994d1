"""Reading a shard set: token shards in one folder, mapped into memory, seen as one stream."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import ArgumentError, CorruptShardError, TokenPositionError
from nmoe.data.manifest import FileRecord, Manifest, read_manifest

TOKEN_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype("<i8")


class ShardSet:
    """The tokens of a shard set, in order; documents end with EOS. Made by `ShardSet.open`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tokens: Sequence[npt.NDArray[np.uint32]],
        indexes: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        self.path = path
        """The folder."""
        self.manifest = manifest
        """What the set says of itself."""
        self._tokens = tokens
        self._indexes = indexes
        self._token_starts = [0, *accumulate(array.size for array in tokens)]
        self._document_starts = [0, *accumulate(array.size for array in indexes)]

    @classmethod
    def open(cls, path: Path, verify: Literal["size", "checksums"] = "size") -> Self:
        """Map a set into memory after checking it.

        `size` checks the manifest, and every file's presence, size and type; `checksums` reads everything and also
        checks each file's SHA-256 and that documents are whole. Raises MissingShardSetError, ManifestError, or
        CorruptShardError naming the file.
        """
        if verify not in ("size", "checksums"):
            raise ArgumentError("verify", expected="'size' or 'checksums'", found=repr(verify), remedy="Choose one.")
        manifest = read_manifest(path)
        tokens: list[npt.NDArray[np.uint32]] = []
        indexes: list[npt.NDArray[np.int64]] = []
        for shard in manifest.shards:
            for record in (shard.tokens, shard.index):
                _check_file(path, record, verify)
            tokens.append(_map(path / shard.tokens.name, TOKEN_DTYPE, shard.n_tokens))
            indexes.append(_map(path / shard.index.name, INDEX_DTYPE, shard.n_documents))
            if verify == "checksums":
                _check_documents(path, shard.index.name, tokens[-1], indexes[-1], manifest.tokenizer.eos_id)
        return cls(path, manifest, tokens, indexes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the tokens; paths, dates and the source do not enter."""
        return self.manifest.fingerprint

    @property
    def n_tokens(self) -> int:
        """Tokens in all, EOS of every document included."""
        return self.manifest.n_tokens

    @property
    def n_documents(self) -> int:
        """Documents in all."""
        return self.manifest.n_documents

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text, EOS not counted."""
        return self.manifest.n_bytes

    @property
    def n_vocab(self) -> int:
        """Ids of the tokenizer, specials included."""
        return self.manifest.tokenizer.n_vocab

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return self.manifest.tokenizer.eos_id

    def tokens(self, start: int, count: int) -> npt.NDArray[np.uint32]:
        """Tokens `start` to `start + count - 1` of the stream, as read-only or fresh uint32 (count,).

        Raises TokenPositionError outside the set.
        """
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise _outside(self.path, f"tokens {start} to {start + count - 1}", f"0 to {self.n_tokens - 1}")
        shard = bisect_right(self._token_starts, start) - 1
        parts: list[npt.NDArray[np.uint32]] = []
        while count > 0:
            local = start - self._token_starts[shard]
            part = self._tokens[shard][local : local + count]
            parts.append(part)
            start, count, shard = start + part.size, count - part.size, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def document(self, number: int) -> npt.NDArray[np.uint32]:
        """Tokens of one document, its EOS included, as uint32 (tokens,). Raises TokenPositionError outside the set."""
        if not 0 <= number < self.n_documents:
            raise _outside(self.path, f"document {number}", f"0 to {self.n_documents - 1}")
        shard = bisect_right(self._document_starts, number) - 1
        local = number - self._document_starts[shard]
        index, tokens = self._indexes[shard], self._tokens[shard]
        stop = int(index[local + 1]) if local + 1 < index.size else tokens.size
        return tokens[int(index[local]) : stop]


def _check_file(folder: Path, record: FileRecord, verify: Literal["size", "checksums"]) -> None:
    path = folder / record.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _corrupt(path, "the file", str(error)) from error
    if size != record.bytes:
        raise _corrupt(path, f"{record.bytes} bytes", f"{size}")
    if verify == "checksums":
        checksum = file_sha256(path)
        if checksum != record.sha256:
            raise _corrupt(path, f"SHA-256 {record.sha256}", checksum)


def _map(path: Path, dtype: np.dtype, count: int) -> npt.NDArray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"a NumPy array of {dtype}", str(error)) from error
    if array.dtype != dtype or array.shape != (count,):
        raise _corrupt(path, f"{dtype} of shape ({count},)", f"{array.dtype} of shape {array.shape}")
    # The plain view slices several times faster than np.memmap does.
    return array.view(np.ndarray)


def _check_documents(
    folder: Path, name: str, tokens: npt.NDArray[np.uint32], index: npt.NDArray[np.int64], eos_id: int
) -> None:
    stops = np.append(index[1:], tokens.size)
    if index[0] != 0 or (stops <= index).any() or (tokens[stops - 1] != eos_id).any():
        raise _corrupt(folder / name, "starts that rise from 0, each after an EOS", "others")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _corrupt(path: Path, expected: str, found: str) -> CorruptShardError:
    return CorruptShardError(
        str(path),
        expected=expected,
        found=found,
        remedy="The shard was damaged or replaced: restore the file, or prepare the data again.",
    )


def _outside(path: Path, asked: str, have: str) -> TokenPositionError:
    return TokenPositionError(str(path), expected=have, found=asked, remedy="Ask for a position inside the set.")
