"""Reading a shard set: token shards in one folder, mapped into memory, seen as one stream."""

import hashlib
import os
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import ArgumentError, CorruptShardError, TokenPositionError
from nmoe.data.manifest import FileRecord, Manifest, ShardRecord, read_manifest

TOKEN_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype("<i8")

_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']+)', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.S
)
"""The start of a one-dimensional array's file as NumPy writes it, in its first 128 bytes."""
_CHECKED_AT_ONCE = 1 << 22


class ShardSet:
    """The tokens of a shard set, in order; documents end with EOS. Made by `ShardSet.open`.

    A shard is mapped when it is first read, and stays so; a mapping holds no file descriptor.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        """The folder."""
        self.manifest = manifest
        """What the set says of itself."""
        self._tokens: list[npt.NDArray[np.uint32] | None] = [None] * len(manifest.shards)
        self._indexes: list[npt.NDArray[np.int64] | None] = [None] * len(manifest.shards)
        self._token_starts = [0, *accumulate(shard.n_tokens for shard in manifest.shards)]
        self._document_starts = [0, *accumulate(shard.n_documents for shard in manifest.shards)]

    @classmethod
    def open(cls, path: Path, verify: Literal["size", "checksums"] = "size") -> Self:
        """Open a set after checking it.

        `size` checks the manifest, and every file's presence, size and type; `checksums` reads everything and also
        checks each file's SHA-256, that documents are whole and that the tokenizer has all ids. Raises
        MissingShardSetError, ManifestError, or CorruptShardError naming the file.
        """
        if verify not in ("size", "checksums"):
            raise ArgumentError("verify", expected="'size' or 'checksums'", found=repr(verify), remedy="Choose one.")
        found = cls(path, read_manifest(path))
        for shard in found.manifest.shards:
            for record, dtype, count in _files(shard):
                header = _read_header(path, record)
                if verify == "checksums":
                    _check_sum(path, record)
                _check_type(path, record, header, dtype, count)
        if verify == "checksums":
            for number in range(len(found.manifest.shards)):
                found._check_documents(number)
        return found

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

        Raises TokenPositionError outside the set, and CorruptShardError for a shard that has gone since.
        """
        parts = self._parts(start, count)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Copies the tokens from `start` on into `out`, of any integer type. Raises as `tokens` does."""
        parts = self._parts(start, out.size)
        if len(parts) == 1:
            out[:] = parts[0]
        elif parts:
            np.concatenate(parts, out=out)

    def document(self, number: int) -> npt.NDArray[np.uint32]:
        """Tokens of one document, its EOS included, as uint32 (tokens,). Raises TokenPositionError outside the set."""
        if not 0 <= number < self.n_documents:
            raise _outside(self.path, f"document {number}", f"0 to {self.n_documents - 1}")
        shard = bisect_right(self._document_starts, number) - 1
        local = number - self._document_starts[shard]
        index, tokens = self.shard_index(shard), self.shard_tokens(shard)
        stop = int(index[local + 1]) if local + 1 < index.size else tokens.size
        return tokens[int(index[local]) : stop]

    def shard_tokens(self, shard: int) -> npt.NDArray[np.uint32]:
        """All tokens of a shard, read-only, by the shard's number in the manifest."""
        array = self._tokens[shard]
        if array is None:
            record = self.manifest.shards[shard]
            array = self._tokens[shard] = _map(self.path, record.tokens, TOKEN_DTYPE, record.n_tokens)
        return array

    def shard_index(self, shard: int) -> npt.NDArray[np.int64]:
        """Where a shard's documents start in it, read-only int64."""
        array = self._indexes[shard]
        if array is None:
            record = self.manifest.shards[shard]
            array = self._indexes[shard] = _map(self.path, record.index, INDEX_DTYPE, record.n_documents)
        return array

    def file_of(self, position: int) -> Path:
        """The file that holds the token at `position` of the stream."""
        return self.path / self.manifest.shards[bisect_right(self._token_starts, position) - 1].tokens.name

    def _parts(self, start: int, count: int) -> list[npt.NDArray[np.uint32]]:
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise _outside(self.path, f"tokens {start} to {start + count - 1}", f"0 to {self.n_tokens - 1}")
        shard = bisect_right(self._token_starts, start) - 1
        parts: list[npt.NDArray[np.uint32]] = []
        while count > 0:
            local = start - self._token_starts[shard]
            part = self.shard_tokens(shard)[local : local + count]
            parts.append(part)
            start, count, shard = start + part.size, count - part.size, shard + 1
        return parts

    def _check_documents(self, shard: int) -> None:
        record, made_by = self.manifest.shards[shard], self.manifest.tokenizer
        tokens, index = self.shard_tokens(shard), self.shard_index(shard)
        stops = np.append(index[1:], tokens.size)
        if index[0] != 0 or (stops <= index).any() or (tokens[stops - 1] != made_by.eos_id).any():
            raise _corrupt(self.path / record.index.name, "starts that rise from 0, each after an EOS", "others")
        largest = max(int(tokens[i : i + _CHECKED_AT_ONCE].max()) for i in range(0, tokens.size, _CHECKED_AT_ONCE))
        if largest >= made_by.n_vocab:
            raise _corrupt(self.path / record.tokens.name, f"ids under {made_by.n_vocab}", str(largest))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files(shard: ShardRecord) -> tuple[tuple[FileRecord, np.dtype, int], ...]:
    return (shard.tokens, TOKEN_DTYPE, shard.n_tokens), (shard.index, INDEX_DTYPE, shard.n_documents)


def _read_header(folder: Path, record: FileRecord) -> bytes:
    """The first bytes of a file of the right size. For thousands of files: a Path and a file object for each would take
    longer than all the rest."""
    try:
        descriptor = os.open(os.path.join(folder, record.name), os.O_RDONLY)
        try:
            size, header = os.fstat(descriptor).st_size, os.read(descriptor, 128)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise _corrupt(folder / record.name, "the file", "no such file") from error
    except OSError as error:
        raise _corrupt(folder / record.name, "a readable file", str(error)) from error
    if size != record.bytes:
        raise _corrupt(folder / record.name, f"{record.bytes} bytes", f"{size}")
    return header


def _check_sum(folder: Path, record: FileRecord) -> None:
    try:
        checksum = file_sha256(folder / record.name)
    except OSError as error:
        raise _corrupt(folder / record.name, "a readable file", str(error)) from error
    if checksum != record.sha256:
        raise _corrupt(folder / record.name, f"SHA-256 {record.sha256}", checksum)


def _check_type(folder: Path, record: FileRecord, header: bytes, dtype: np.dtype, count: int) -> None:
    told = _HEADER.match(header)
    if told is not None and (told[1], int(told[2])) == (dtype.str.encode(), count):
        return
    path = folder / record.name
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"a NumPy array of {dtype}", str(error)) from error
    if found.dtype != dtype or found.shape != (count,):
        raise _corrupt(path, f"{dtype} of shape ({count},)", f"{found.dtype} of shape {found.shape}")


def _map(folder: Path, record: FileRecord, dtype: np.dtype, count: int) -> npt.NDArray:
    # Not np.memmap, whose mapping keeps a file descriptor open: a large set has more shards than a process may have.
    import pyarrow as pa

    path = folder / record.name
    try:
        with pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
    except OSError as error:
        raise _corrupt(path, "the file", str(error)) from error
    if buffer.size != record.bytes:
        raise _corrupt(path, f"{record.bytes} bytes", f"{buffer.size}")
    return np.frombuffer(buffer, dtype, count, record.bytes - count * dtype.itemsize)  # after the header


def _corrupt(path: Path, expected: str, found: str) -> CorruptShardError:
    return CorruptShardError(
        str(path),
        expected=expected,
        found=found,
        remedy="The shard was damaged or replaced: restore the file, or prepare the data again.",
    )


def _outside(path: Path, asked: str, have: str) -> TokenPositionError:
    return TokenPositionError(str(path), expected=have, found=asked, remedy="Ask for a position inside the set.")
