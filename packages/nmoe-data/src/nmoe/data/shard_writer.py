"""Writing a shard set, one batch of documents at a time."""

import io
import os
import zlib
from array import array
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import EmptySourceError, TokenRangeError
from nmoe.data.manifest import FileRecord, Manifest, ShardRecord, TokenizerRecord, write_manifest
from nmoe.data.shards import INDEX_DTYPE, TOKEN_DTYPE, file_sha256
from nmoe.data.tokenizers import Tokenizer, to_utf8


class ShardWriter:
    """Writes one shard set into a new folder; the set is complete once `finish` has returned.

    Of the tokens only the batch at hand is in memory. Used as a context, it closes its files whatever happens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, *, measure_gzip: bool = False) -> None:
        folder.mkdir()
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._meter = GzipMeter() if measure_gzip else None
        self._eos = np.array([tokenizer.eos_id], TOKEN_DTYPE).tobytes()
        self._shards: list[ShardRecord] = []
        self._n_bytes = 0
        self._open: _OpenShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.abandon()

    def add(self, texts: Sequence[str]) -> None:
        """Append documents. Raises TokenRangeError if the tokenizer gives an id that it says it does not have."""
        for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
            if ids.size and ids.max() >= self._tokenizer.n_vocab:
                raise TokenRangeError(
                    f"tokenizer {self._tokenizer.name!r}",
                    expected=f"ids under {self._tokenizer.n_vocab}",
                    found=str(ids.max()),
                    remedy="Mend the tokenizer.",
                )
            data = to_utf8(text)
            self._n_bytes += len(data)
            if self._meter is not None:
                self._meter.add(data)
            if self._open is not None and self._open.n_tokens + ids.size + 1 > self._shard_tokens:
                self._close()
            if self._open is None:
                self._open = _OpenShard(self._folder, len(self._shards))
            self._open.add(ids, self._eos)

    def finish(self, source: Mapping[str, Any]) -> None:
        """Close the last shard and write the manifest. Raises EmptySourceError if there was no text at all."""
        if self._n_bytes == 0:
            raise EmptySourceError(
                f"the {self._folder.name} set",
                expected="text",
                found="empty documents only",
                remedy="Give more text, or another val_fraction.",
            )
        self._close()
        tokenizer = self._tokenizer
        manifest = Manifest(
            tool=_tool(),
            tokenizer=TokenizerRecord(
                name=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                n_vocab=tokenizer.n_vocab,
                eos_id=tokenizer.eos_id,
            ),
            n_tokens=sum(shard.n_tokens for shard in self._shards),
            n_documents=sum(shard.n_documents for shard in self._shards),
            n_bytes=self._n_bytes,
            gzip_bits_per_byte=None if self._meter is None else self._meter.bits_per_byte(),
            source=dict(source),
            shards=self._shards,
        )
        write_manifest(self._folder, manifest)

    def _close(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None


class _OpenShard:
    """The shard that is being written: tokens go to disk as they come, document starts are kept (8 bytes each)."""

    def __init__(self, folder: Path, number: int) -> None:
        self._tokens_path = folder / f"shard_{number:05d}.npy"
        self._index_path = folder / f"shard_{number:05d}.idx"
        self._starts = array("q")
        self._handle = open(self._tokens_path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close() or abandon()
        # The header tells the length, so it comes last; its size does not depend on the length.
        self._handle.write(_npy_header(TOKEN_DTYPE, 0))
        self.n_tokens = 0

    def add(self, ids: npt.NDArray[np.uint32], eos: bytes) -> None:
        self._starts.append(self.n_tokens)
        self._handle.write(np.ascontiguousarray(ids, TOKEN_DTYPE).tobytes())
        self._handle.write(eos)
        self.n_tokens += ids.size + 1

    def abandon(self) -> None:
        self._handle.close()

    def close(self) -> ShardRecord:
        header = _npy_header(TOKEN_DTYPE, self.n_tokens)
        assert len(header) == len(_npy_header(TOKEN_DTYPE, 0)), "NumPy pads headers so that lengths can grow"
        with self._handle as handle:
            handle.seek(0)
            handle.write(header)
            handle.flush()
            os.fsync(handle.fileno())
        starts = np.frombuffer(self._starts, np.int64).astype(INDEX_DTYPE)
        with open(self._index_path, "wb") as handle:
            handle.write(_npy_header(INDEX_DTYPE, starts.size))
            handle.write(starts.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        return ShardRecord(
            tokens=_record(self._tokens_path),
            index=_record(self._index_path),
            n_tokens=self.n_tokens,
            n_documents=starts.size,
        )


class GzipMeter:
    """Measures what gzip -9 makes of text that comes in parts."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
        self._read = self._written = 0

    def add(self, data: bytes) -> None:
        """Append UTF-8 text."""
        self._read += len(data)
        self._written += len(self._compressor.compress(data))

    def bits_per_byte(self) -> float:
        """End the stream and give compressed bits over bytes of text."""
        self._written += len(self._compressor.flush())
        return 8 * self._written / self._read


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
    return header.getvalue()


def _record(path: Path) -> FileRecord:
    return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def _tool() -> str:
    """What writes, with its version; a source tree on the path has none."""
    try:
        return f"nmoe-data {version('nmoe-data')}"
    except PackageNotFoundError:
        return "nmoe-data from source"
