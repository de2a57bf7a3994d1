"""What an evaluation reads: tasks' data, and texts for bits per byte."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nmoe.cli.context import Context
from nmoe.cli.errors import UsageError
from nmoe.data.loader import IGNORE_INDEX, validation_batches
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer, load_tokenizer
from nmoe.eval.registry import load_suites
from nmoe.eval.schema import EvalConfig
from nmoe.eval.sources import Sources, Suite
from nmoe.eval.validation import Batch, ValidationSet

_DOCUMENTS_AT_ONCE = 256


def open_suites(
    names: Sequence[str],
    folder: Path | None,
    context: Context,
    *,
    allow_missing: bool = False,
    unsafe_exec: bool = False,
) -> list[Suite]:
    """The tasks that the names stand for, with their data: from a folder, by default the data root (or `eval_bundle` in
    it), and from the Hugging Face hub what is not there.

    Raises:
        EvalError: a name stands for nothing, data is missing or wrong, or programs cannot be contained here.
    """
    if not names:
        return []
    if folder is not None and not folder.is_dir():
        raise UsageError(f"expected a folder with the tasks' data, found none at {folder}")
    folders = (context.data_root if folder is None else folder,)
    sources = Sources(folders, allow_missing=allow_missing, unsafe_exec=unsafe_exec)
    return list(load_suites(names, sources).values())


def open_run_suites(config: EvalConfig, context: Context) -> list[Suite]:
    """The tasks that a run measures besides validation. Raises as `open_suites` does."""
    return open_suites(config.benchmarks, config.data, context, allow_missing=config.allow_missing)


@dataclass(frozen=True)
class Text:
    """A text as a model with some tokenizer scores it."""

    windows: ValidationSet
    fingerprint: str
    """Of the shard set: of the text, and of the tokenizer that it was prepared with."""
    described: str


def open_text(folder: Path, tokenizer: Tokenizer, seq_len: int, batch: int) -> Text:
    """A shard set, or the `val` of a prepared folder, in windows of the model's own tokens.

    A set of another tokenizer is read as text and encoded again, document by document: so that models of different
    tokenizers are measured on the same bytes.

    Raises:
        DataError: there is no whole shard set, or its tokenizer is not to be had.
    """
    folder = folder / "val" if (folder / "val").is_dir() else folder
    shards = ShardSet.open(folder)
    made_by = shards.manifest.tokenizer
    if made_by.fingerprint == tokenizer.fingerprint:
        windows = ValidationSet(lambda: validation_batches(shards, seq_len, batch), shards.n_tokens, shards.n_bytes)
        return Text(windows, shards.fingerprint, str(folder))
    other = load_tokenizer(made_by.name)
    if other.fingerprint != made_by.fingerprint:
        raise UsageError(
            f"expected the tokenizer that made {folder}, {made_by.name} of fingerprint {made_by.fingerprint[:12]}, "
            f"found one of fingerprint {other.fingerprint[:12]}: the tokens cannot be read as text"
        )
    windows = ValidationSet(
        lambda: windows_of(_encoded(shards, other, tokenizer), tokenizer.eos_id, seq_len, batch), 0, shards.n_bytes
    )
    return Text(windows, shards.fingerprint, f"{folder}, from tokens of {made_by.name}")


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes that each id stands for, (V,)."""
    return np.array([len(tokenizer.decode_bytes([number])) for number in range(tokenizer.n_vocab)])


def windows_of(documents: Iterator[list[int]], eos_id: int, seq_len: int, batch: int) -> Iterator[Batch]:
    """Documents' tokens, each once a target, in windows as `validation_batches` makes them of a shard set."""
    tokens = chain.from_iterable(chain(ids, [eos_id]) for ids in documents)
    previous = eos_id
    while part := list(islice(tokens, batch * seq_len)):
        rows = -(-len(part) // seq_len)
        targets, inputs = np.full(rows * seq_len, IGNORE_INDEX), np.full(rows * seq_len, eos_id)
        targets[: len(part)] = part
        inputs[0], inputs[1 : len(part)] = previous, part[:-1]
        previous = part[-1]
        yield inputs.reshape(rows, seq_len), targets.reshape(rows, seq_len)


def _encoded(shards: ShardSet, other: Tokenizer, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for first in range(0, shards.n_documents, _DOCUMENTS_AT_ONCE):
        numbers = range(first, min(first + _DOCUMENTS_AT_ONCE, shards.n_documents))
        for ids in tokenizer.encode_batch([other.decode(shards.document(number)) for number in numbers]):
            yield ids.tolist()
