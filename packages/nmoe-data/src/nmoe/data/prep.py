"""Documents to shard sets."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.data.atomic import new_folder
from nmoe.data.errors import ArgumentError, EmptySourceError, SourceChangedError
from nmoe.data.shard_writer import GzipMeter, ShardWriter
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer

SHARD_TOKENS = 1 << 27
"""Tokens a shard by default: 512 MiB."""

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote."""

    path: Path
    train: ShardSet
    val: ShardSet | None


def prepare(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    output: Path,
    *,
    val_fraction: float,
    source: Mapping[str, Any],
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenize `documents` into the shard sets `output/train` and, unless `val_fraction` is 0, `output/val`.

    Validation is the last `val_fraction` of the documents, rounded, at least one. `documents` is iterated twice, to
    count and check and then to tokenize, and never held whole: memory does not grow with it. `source` goes into the
    manifests (JSON values). `shard_tokens` closes a shard; a document is never split, so that one longer than that has
    its own. `progress(done, total)` is called with numbers of documents. `output` appears whole or not at all.

    Raises ArgumentError, OutputExistsError, EmptySourceError, SourceChangedError, WriteError, and what `documents`
    raises.
    """
    if not 0 <= val_fraction < 1:
        raise ArgumentError(
            "val_fraction",
            expected="a number from 0 up to, not including, 1",
            found=repr(val_fraction),
            remedy="Lower it.",
        )
    if shard_tokens < 1:
        raise ArgumentError("shard_tokens", expected="1 or more", found=repr(shard_tokens), remedy="Raise it.")
    if iter(documents) is documents:
        raise ArgumentError(
            "documents",
            expected="something that can be iterated twice",
            found=f"a {type(documents).__name__}",
            remedy="Give a list, or an object whose __iter__ starts anew.",
        )
    with new_folder(output) as building, ExitStack() as files:
        total = sum(1 for _ in documents)
        n_val = _validation_documents(total, val_fraction)
        writers = [files.enter_context(ShardWriter(building / "train", tokenizer, shard_tokens))]
        if n_val:
            val = ShardWriter(building / "val", tokenizer, shard_tokens, measure_gzip=True)
            writers.append(files.enter_context(val))
        done = 0
        for batch in _batches(documents):
            # Without a validation set n_train is the whole batch, and zip stops at the one writer.
            n_train = min(len(batch), max(0, total - n_val - done))
            done += len(batch)
            for writer, part in zip(writers, (batch[:n_train], batch[n_train:]), strict=False):
                writer.add(part)
            if progress is not None:
                progress(done, total)
        if done != total:
            raise SourceChangedError(
                "documents",
                expected=f"the {total} documents of the first reading again",
                found=str(done),
                remedy="Let nothing write to the sources meanwhile.",
            )
        for writer in writers:
            writer.finish(source)
    return Prepared(output, ShardSet.open(output / "train"), ShardSet.open(output / "val") if n_val else None)


def gzip_bits_per_byte(shards: ShardSet, tokenizer: Tokenizer) -> float:
    """Bits that gzip -9 needs for a byte of the set's text: what a model should beat.

    Validation sets have it in their manifest; for others the whole text is decoded and compressed.
    """
    if shards.manifest.gzip_bits_per_byte is not None:
        return shards.manifest.gzip_bits_per_byte
    meter = GzipMeter()
    for number in range(shards.n_documents):
        meter.add(tokenizer.decode_bytes(shards.document(number)))
    return meter.bits_per_byte()


def _validation_documents(total: int, fraction: float) -> int:
    if total == 0:
        raise EmptySourceError(
            "documents", expected="at least one document", found="none", remedy="Check the paths and the text key."
        )
    n_val = max(1, round(total * fraction)) if fraction > 0 else 0
    if n_val == total:
        raise EmptySourceError(
            "documents",
            expected="documents for training and for validation",
            found=f"{total} in all, of which validation takes {n_val}",
            remedy="Give more documents, or a smaller val_fraction (0: no validation set).",
        )
    return n_val


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
