"""Text to shard sets: one pass over a source, in parallel, that may be killed at any time and run again."""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nmoe.data.atomic import new_folder
from nmoe.data.dedup import SeenDocuments
from nmoe.data.errors import ArgumentError, EmptySourceError
from nmoe.data.manifest import write_manifest
from nmoe.data.prep_state import Partial, partial_folder
from nmoe.data.shard_writer import ShardWriter, tool
from nmoe.data.shards import ShardSet
from nmoe.data.sources import Source
from nmoe.data.tokenized import Tokenized, tokenize
from nmoe.data.tokenizers import Tokenizer
from nmoe.data.workers import tokenize_blocks

SHARD_TOKENS = 1 << 27
"""Tokens a shard by default: 512 MiB."""
SAVE_GAP_S = 2.0
"""Seconds of work that a kill may cost."""
GZIP_PART = 1 << 20
"""Bytes of text that gzip sees at once."""
GZIP_LIMIT = 1 << 26
"""Bytes of text after which the measure is good enough."""

_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Prepared:
    """What prep wrote."""

    path: Path
    train: ShardSet
    val: ShardSet | None
    duplicates: int = 0
    """Documents that deduplication left out."""


@dataclass(frozen=True)
class Progress:
    """How far prep is."""

    documents: int = 0
    """Documents written, validation included."""
    tokens: int = 0
    """Their tokens, EOS included."""
    text_bytes: int = 0
    """Their text in UTF-8."""
    duplicates: int = 0
    """Documents left out because the same text came before."""
    read: int = 0
    """Bytes of the source that are done, as they lie on disk."""
    total: int | None = None
    """Bytes of the source in all, where known."""


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    output: Path,
    *,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    workers: int = 1,
    dedupe: bool = False,
    progress: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenize a source into the shard sets `output/train` and, unless `val_fraction` is 0, `output/val`.

    Validation is every document i (from 0) with floor(i·f) ≠ floor((i-1)·f): the first one and then one in 1/f, so
    ceil(n·f) of n. `max_tokens` ends prep after the document that reaches so many, validation included. `dedupe` keeps
    of equal documents the first. `shard_tokens` closes a shard; a document is never split, so that one longer than
    that has its own. `workers` processes tokenize (1: this one); the output's bytes do not depend on their number, nor
    on interruptions: work goes on in `output.partial`, kept by errors and kills alike, and a second call with the same
    arguments continues. `output` appears whole or not at all. Memory holds a few blocks a worker, however long the
    source is.

    `progress` is called with the state found and after each block; `notice` with what a person should know.

    Raises ArgumentError, OutputExistsError, PrepRunningError, PrepStateError if what an interruption left belongs to
    other arguments or another source, EmptySourceError, WorkerDiedError, WriteError, and what the source raises.
    """
    _check(val_fraction, shard_tokens, max_tokens, workers)
    part = _exact(val_fraction)
    settings = {
        "tokenizer": f"{tokenizer.name} {tokenizer.fingerprint[:12]}",
        "val_fraction": str(part),
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
        "dedupe": dedupe,
        "release": tool(),
        **{f"source's {key}": value for key, value in source.identity().items()},
    }
    with partial_folder(output) as partial:
        state = partial.load(settings)
        try:
            with ExitStack() as files:
                run = _Run(partial, settings, state, part, shard_tokens, max_tokens, dedupe, source.total, files)
                if state is not None and notice is not None:
                    notice(f"Going on in {partial.path} after {run.now.documents:,} documents")
                run.tokenize(source, tokenizer, workers, progress)
                n_val = run.finish(tokenizer, source.describe())
        except EmptySourceError:
            partial.discard()
            raise
        except BaseException:
            # Nothing that would be gone on with: nothing is left behind.
            if partial.load(settings) is None:
                partial.discard()
            raise
        if n_val:
            _measure_gzip(partial.data / "val", tokenizer, workers)
        partial.publish()
    val = ShardSet.open(output / "val") if n_val else None
    return Prepared(output, ShardSet.open(output / "train"), val, run.now.duplicates)


class _Run:
    """One run of prep: what is written, and how far."""

    def __init__(
        self,
        partial: Partial,
        settings: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        val_fraction: Fraction,
        shard_tokens: int,
        max_tokens: int | None,
        dedupe: bool,
        total: int | None,
        files: ExitStack,
    ) -> None:
        state = state or {"position": None, "ended": False, "seen": 0, "progress": asdict(Progress(total=total))}
        self._partial = partial
        self._settings = settings
        self._val_fraction = val_fraction
        self._max_tokens = max_tokens
        self.now = Progress(**state["progress"])
        self._position = state["position"]
        self._ended = state["ended"]
        self._seen_documents = state["seen"]
        self._seen = (
            files.enter_context(SeenDocuments(partial.path / "seen.db", self._seen_documents)) if dedupe else None
        )
        sets = ("train", "val") if val_fraction else ("train",)
        self._writers = {
            name: files.enter_context(ShardWriter(partial.data / name, shard_tokens, state.get(name))) for name in sets
        }
        self._settled = self._snapshot()

    def tokenize(
        self,
        source: Source,
        tokenizer: Tokenizer,
        workers: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        """Read what is left of the source, and write it."""
        tell = progress or (lambda now: None)
        tell(self.now)
        if self._ended:
            return
        saved = time.monotonic()
        cuts = source.blocks(self._position)
        try:
            with closing(tokenize_blocks(cuts, tokenizer, workers, digests=self._seen is not None)) as blocks:
                for cut, made in blocks:
                    self._write(made)
                    self._position = cut.after
                    self.now = replace(self.now, read=cut.read)
                    self._settled = self._snapshot()
                    tell(self.now)
                    if self._ended:
                        break
                    if time.monotonic() - saved >= SAVE_GAP_S:
                        self._save()
                        saved = time.monotonic()
            self._ended = True
            self._settled = self._snapshot()
        finally:
            # After an error too: as it was between two blocks.
            if self._settled["progress"]["documents"]:
                self._save()

    def finish(self, tokenizer: Tokenizer, source: Mapping[str, Any]) -> int:
        """Complete both sets; the number of validation documents. Raises EmptySourceError."""
        if not all(writer.n_bytes for writer in self._writers.values()):
            self._refuse_empty()
        prep = {
            "val_fraction": float(self._val_fraction),
            "max_tokens": self._max_tokens,
            "duplicates": None if self._seen is None else self.now.duplicates,
        }
        made = {name: writer.finish(tokenizer, {**source, "prep": prep}) for name, writer in self._writers.items()}
        return made["val"].n_documents if "val" in made else 0

    def _write(self, made: Tokenized) -> None:
        documents = made.lengths.size
        kept = np.ones(documents, np.bool_) if self._seen is None else self._seen.first_times(made.digests)
        made = made.take(kept)
        if self._max_tokens is not None:
            totals = self.now.tokens + np.cumsum(made.lengths)
            enough = int(np.searchsorted(totals, self._max_tokens))
            if enough < made.lengths.size:
                made, self._ended = made.head(enough + 1), True
                # Where the block ends depends on interruptions, and duplicates after the last document do not count.
                documents = int(np.flatnonzero(kept)[enough]) + 1
        duplicates = documents - made.lengths.size
        self._seen_documents += documents
        val = _is_validation(self.now.documents, made.lengths.size, self._val_fraction)
        for name, writer in self._writers.items():
            part = made.take(val if name == "val" else ~val)
            writer.add(part.tokens, part.lengths, part.n_bytes)
        now = self.now
        self.now = replace(
            now,
            documents=now.documents + made.lengths.size,
            tokens=now.tokens + made.tokens.size,
            text_bytes=now.text_bytes + int(made.n_bytes.sum()),
            duplicates=now.duplicates + duplicates,
        )

    def _snapshot(self) -> dict[str, Any]:
        return {
            "position": self._position,
            "ended": self._ended,
            "seen": self._seen_documents,
            "progress": asdict(self.now),
            **{name: writer.mark() for name, writer in self._writers.items()},
        }

    def _save(self) -> None:
        records = {name: writer.record(self._settled[name]) for name, writer in self._writers.items()}
        if self._seen is not None:
            self._seen.commit()
        self._partial.save(self._settings, {**self._settled, **records})

    def _refuse_empty(self) -> None:
        n_documents = self.now.documents
        if n_documents == 0:
            raise EmptySourceError(
                "the source",
                expected="at least one document with text",
                found="none",
                remedy="Check the paths and the text key.",
            )
        reached = self._max_tokens is not None and self.now.tokens >= self._max_tokens
        more = "Raise max_tokens" if reached else "Give more documents"
        raise EmptySourceError(
            "the source",
            expected="documents for training and for validation",
            found=f"{n_documents} in all, of which validation takes the first",
            remedy=f"{more}, or no val_fraction (0: no validation set).",
        )


def prepare_documents(
    sets: Mapping[Literal["train", "val"], Sequence[str]],
    tokenizer: Tokenizer,
    output: Path,
    *,
    source: Mapping[str, Any],
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared:
    """Tokenize documents that are at hand into `output/train` and, if it is among `sets`, `output/val`.

    For small corpora: documents are taken as they are, empty ones too, and the split is the caller's. `source` goes
    into the manifests (JSON values). Raises OutputExistsError, EmptySourceError, WriteError.
    """
    with new_folder(output) as building:
        for name, texts in sets.items():
            if not any(texts):
                raise EmptySourceError(
                    f"the {name} set", expected="text", found="empty documents only", remedy="Give more text."
                )
            with ShardWriter(building / name, shard_tokens) as writer:
                for batch in _batches(texts):
                    made = tokenize(batch, tokenizer)
                    writer.add(made.tokens, made.lengths, made.n_bytes)
                writer.finish(tokenizer, source)
        if "val" in sets:
            _measure_gzip(building / "val", tokenizer, 1)
    return Prepared(output, ShardSet.open(output / "train"), ShardSet.open(output / "val") if "val" in sets else None)


def gzip_bits_per_byte(shards: ShardSet, tokenizer: Tokenizer, workers: int = 1) -> float:
    """Bits that gzip -9 needs for a byte of the set's text: what a model should beat.

    Validation sets have it in their manifest. Measured on the first 64 MiB, each MiB by itself, in `workers` threads.
    """
    if shards.manifest.gzip_bits_per_byte is not None:
        return shards.manifest.gzip_bits_per_byte
    read = written = 0
    parts = _text_parts(shards, tokenizer)
    with ThreadPoolExecutor(workers) as threads:
        # A few at a time, so that not all of the text is held.
        while some := list(islice(parts, 2 * workers)):
            read += sum(map(len, some))
            written += sum(threads.map(_gzip_size, some))
    return 8 * written / read


def _measure_gzip(folder: Path, tokenizer: Tokenizer, workers: int) -> None:
    shards = ShardSet.open(folder)
    measured = gzip_bits_per_byte(shards, tokenizer, workers)
    write_manifest(folder, shards.manifest.model_copy(update={"gzip_bits_per_byte": measured}))


def _text_parts(shards: ShardSet, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The set's text up to the limit, in parts of equal size but the last."""
    pending = b""
    left = GZIP_LIMIT
    for number in range(shards.n_documents):
        pending += tokenizer.decode_bytes(shards.document(number))
        while len(pending) >= GZIP_PART and left:
            yield pending[:GZIP_PART]
            pending, left = pending[GZIP_PART:], left - GZIP_PART
        if not left:
            return
    if pending:
        yield pending


def _gzip_size(data: bytes) -> int:
    return len(zlib.compress(data, 9, wbits=16 + zlib.MAX_WBITS))


def _exact(val_fraction: float) -> Fraction:
    """The fraction as it is written in decimals, with a denominator that keeps `_is_validation` within int64."""
    return Fraction(str(val_fraction)).limit_denominator(10**9)


def _is_validation(first: int, count: int, fraction: Fraction) -> npt.NDArray[np.bool_]:
    """Which of the documents `first` to `first + count - 1` are validation, as (count,)."""
    p, q = fraction.numerator, fraction.denominator
    # Whole multiples of q taken off, so that no product leaves int64 however many documents came before.
    steps = (first * p % q + np.arange(-1, count, dtype=np.int64) * p) // q
    return np.diff(steps) != 0


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        yield batch


def _check(val_fraction: float, shard_tokens: int, max_tokens: int | None, workers: int) -> None:
    if not 0 <= val_fraction < 1:
        raise ArgumentError(
            "val_fraction",
            expected="a number from 0 up to, not including, 1",
            found=repr(val_fraction),
            remedy="Lower it.",
        )
    if val_fraction and not _exact(val_fraction):
        raise ArgumentError(
            "val_fraction",
            expected="0, or one in 1,000,000,000 or more",
            found=repr(val_fraction),
            remedy="Raise it, or pass 0 for no validation set.",
        )
    for name, value in (("shard_tokens", shard_tokens), ("max_tokens", max_tokens), ("workers", workers)):
        if value is not None and value < 1:
            raise ArgumentError(name, expected="1 or more", found=repr(value), remedy="Raise it.")
