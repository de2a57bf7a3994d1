"""Writing a shard set from tokens as they come, in a folder that writing can be taken up in again."""

import io
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from nmoe.data.atomic import sync_folder
from nmoe.data.errors import PrepStateError
from nmoe.data.manifest import MANIFEST_NAME, FileRecord, Manifest, ShardRecord, TokenizerRecord, write_manifest
from nmoe.data.shards import INDEX_DTYPE, TOKEN_DTYPE, file_sha256
from nmoe.data.tokenizers import Tokenizer

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Mark:
    """How far a set was written at one moment."""

    closed: int
    """Shards that were complete."""
    tokens: int
    """Tokens in the shard after those, 0 if none was begun."""
    documents: int
    """Documents in it."""
    n_bytes: int
    """UTF-8 bytes of text in all."""


class ShardWriter:
    """Writes one shard set into a folder; the set is complete once `finish` has returned.

    Of the tokens only what is passed is in memory. A shard that is full is synced and its checksum taken in a thread.
    Used as a context, it closes its files whatever happens.
    """

    def __init__(self, folder: Path, shard_tokens: int, begun: Mapping[str, Any] | None = None) -> None:
        """Begin in a new folder, or go on from what `record` gave: what was written after it is dropped.

        Raises PrepStateError if less is there than the record says.
        """
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._shards: list[ShardRecord] = []
        self._closing: list[Future[ShardRecord]] = []
        self._thread = ThreadPoolExecutor(1, "shard-closer")
        self._n_bytes = 0
        self._open: _OpenShard | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if begun is not None:
            self._go_on(begun)
        self._drop_what_follows()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._open is not None:
            self._open.abandon()

    def add(
        self, tokens: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], n_bytes: npt.NDArray[np.int64]
    ) -> None:
        """Append documents: all their tokens, EOS of each included, how many each has, and the UTF-8 bytes of each."""
        self._n_bytes += int(n_bytes.sum())
        stops = np.cumsum(lengths)
        first = start = 0
        while first < lengths.size:
            if self._open is None:
                self._open = _OpenShard(self._folder, self._n_closed)
            room = max(0, self._shard_tokens - self._open.n_tokens)
            last = int(np.searchsorted(stops, start + room, side="right"))
            if last == first:
                if self._open.n_tokens:
                    self._close()
                    continue
                last += 1  # longer than a shard: it has one of its own
            stop = int(stops[last - 1])
            self._open.add(tokens[start:stop], stops[first:last] - lengths[first:last] - start)
            first, start = last, stop

    def mark(self) -> Mark:
        """Where writing stands, for `record`."""
        tokens, documents = (self._open.n_tokens, self._open.n_documents) if self._open else (0, 0)
        return Mark(self._n_closed, tokens, documents, self._n_bytes)

    def record(self, mark: Mark) -> dict[str, Any]:
        """Sync all files to disk; what must be known to go on from `mark` (JSON values)."""
        self._settle()
        if self._open is not None:
            self._open.sync()
        return {
            "shards": [shard.model_dump(mode="json") for shard in self._shards[: mark.closed]],
            "tokens": mark.tokens,
            "documents": mark.documents,
            "n_bytes": mark.n_bytes,
        }

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of text so far."""
        return self._n_bytes

    def finish(self, tokenizer: Tokenizer, source: Mapping[str, Any]) -> Manifest:
        """Close the last shard and write the manifest. There must be text."""
        self._close()
        self._settle()
        manifest = Manifest(
            tool=tool(),
            tokenizer=TokenizerRecord(
                name=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                n_vocab=tokenizer.n_vocab,
                eos_id=tokenizer.eos_id,
            ),
            n_tokens=sum(shard.n_tokens for shard in self._shards),
            n_documents=sum(shard.n_documents for shard in self._shards),
            n_bytes=self._n_bytes,
            source=dict(source),
            shards=self._shards,
        )
        write_manifest(self._folder, manifest)
        sync_folder(self._folder)
        return manifest

    @property
    def _n_closed(self) -> int:
        return len(self._shards) + len(self._closing)

    def _close(self) -> None:
        if self._open is not None:
            shard, self._open = self._open, None
            shard.complete()
            self._closing.append(self._thread.submit(shard.close))

    def _settle(self) -> None:
        while self._closing:
            self._shards.append(self._closing[0].result())
            del self._closing[0]

    def _go_on(self, begun: Mapping[str, Any]) -> None:
        self._shards = [ShardRecord.model_validate(shard) for shard in begun["shards"]]
        self._n_bytes = begun["n_bytes"]
        for shard in self._shards:
            for record in (shard.tokens, shard.index):
                path = self._folder / record.name
                if not path.is_file() or path.stat().st_size != record.bytes:
                    raise _shrunk(path, f"{record.bytes} bytes")
        if begun["documents"]:
            self._open = _OpenShard(self._folder, self._n_closed, begun["tokens"], begun["documents"])

    def _drop_what_follows(self) -> None:
        known = {record.name for shard in self._shards for record in (shard.tokens, shard.index)}
        if self._open is not None:
            known |= {path.name for path in self._open.paths}
        for path in self._folder.iterdir():
            if path.name not in known and (path.suffix in (".npy", ".idx") or MANIFEST_NAME in path.name):
                path.unlink()


class _OpenShard:
    """The shard that is being written: tokens and document starts go to disk as they come."""

    def __init__(self, folder: Path, number: int, n_tokens: int = 0, n_documents: int = 0) -> None:
        self.paths = folder / f"shard_{number:05d}.npy", folder / f"shard_{number:05d}.idx"
        self.n_tokens = n_tokens
        self.n_documents = n_documents
        self._tokens = _open(self.paths[0], TOKEN_DTYPE, n_tokens)
        self._starts = _open(self.paths[1], INDEX_DTYPE, n_documents)

    def add(self, tokens: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64]) -> None:
        """Append documents; their starts count from the first of them."""
        self._starts.write(np.ascontiguousarray(starts + self.n_tokens, INDEX_DTYPE).data)
        self._tokens.write(np.ascontiguousarray(tokens, TOKEN_DTYPE).data)
        self.n_tokens += tokens.size
        self.n_documents += starts.size

    def sync(self) -> None:
        """Make what was added durable."""
        for handle in (self._tokens, self._starts):
            handle.flush()
            os.fsync(handle.fileno())

    def complete(self) -> None:
        """Write the headers, which tell the lengths."""
        for handle, dtype, count in (
            (self._tokens, TOKEN_DTYPE, self.n_tokens),
            (self._starts, INDEX_DTYPE, self.n_documents),
        ):
            handle.seek(0)
            handle.write(_npy_header(dtype, count))

    def close(self) -> ShardRecord:
        """Sync and close the files, and take their checksums."""
        self.sync()
        self.abandon()
        return ShardRecord(
            tokens=_record(self.paths[0]),
            index=_record(self.paths[1]),
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
        )

    def abandon(self) -> None:
        """Close the files as they are."""
        self._tokens.close()
        self._starts.close()


def _open(path: Path, dtype: np.dtype, count: int) -> BinaryIO:
    """The file, ready for the element after `count`. Its header is a placeholder of the final one's length."""
    header = _npy_header(dtype, 0)
    if not count:
        handle = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115 - closed with the shard
        handle.write(header)
        return handle
    size = len(header) + count * dtype.itemsize
    if not path.is_file() or path.stat().st_size < size:
        raise _shrunk(path, f"at least {size} bytes")
    handle = open(path, "r+b", buffering=_BUFFER)  # noqa: SIM115 - closed with the shard
    handle.truncate(size)
    handle.seek(size)
    return handle


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    header = io.BytesIO()
    # NumPy pads headers so that lengths can grow.
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    return header.getvalue()


def _record(path: Path) -> FileRecord:
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def _shrunk(path: Path, expected: str) -> PrepStateError:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
    remedy = "Something altered unfinished work: delete the .partial folder and prepare from the start."
    return PrepStateError(str(path), expected=expected, found=found, remedy=remedy)


def tool() -> str:
    """What writes, with its version; a source tree on the path has none."""
    try:
        return f"nmoe-data {version('nmoe-data')}"
    except PackageNotFoundError:
        return "nmoe-data from source"
