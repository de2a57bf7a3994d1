"""Opens what a configuration's `[data]` section names: tokenizer, shard sets, batches, validation set."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from nmoe.cli.console import print_line
from nmoe.cli.errors import UsageError
from nmoe.cli.units import format_bytes
from nmoe.data.corpus import corpus_description, prepare_corpus
from nmoe.data.guards import check_tokenizer, check_vocabulary
from nmoe.data.loader import validation_batches
from nmoe.data.manifest import read_manifest
from nmoe.data.schema import DataConfig
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer, load_tokenizer
from nmoe.eval.validation import ValidationSet
from rich.console import Console

CHECKSUM_LIMIT = 1 << 30
"""Bytes of a shard set up to which every start checks each of them: a second or two of SHA-256."""


@dataclass(frozen=True)
class RunData:
    """Tokens of a run, checked against tokenizer and model."""

    tokenizer: Tokenizer
    train: ShardSet
    val: ShardSet | None
    """None: nothing is validated."""


def open_run_data(
    data: DataConfig, vocab_size: int, data_root: Path, console: Console, *, verify: bool = True
) -> RunData:
    """Opens the data of a run; a built-in corpus is prepared on first use, and that is said.

    Sets of up to `CHECKSUM_LIMIT` bytes are compared with their checksums; of a larger one only the files' sizes are,
    and that is said too.

    Args:
        data: the `[data]` section.
        vocab_size: ids that the model knows.
        data_root: where built-in corpora are kept.
        console: where to say what is prepared, and what is not checked.
        verify: False where another process of this run compares checksums.

    Raises:
        UsageError: the section names no data.
        DataError: the data is missing, damaged, or of another tokenizer.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    train, val = _folders(data, tokenizer, data_root, console)
    sets = [None if folder is None else _open(folder, console, verify) for folder in (train, val)]
    for shards in sets:
        if shards is not None:
            check_tokenizer(shards, tokenizer)
            check_vocabulary(shards, vocab_size)
    assert sets[0] is not None, "there is always a training folder"
    return RunData(tokenizer, sets[0], sets[1])


def validation_set(shards: ShardSet, seq_len: int, batch: int) -> ValidationSet:
    """A shard set as the evaluator takes it, in batches of `batch` sequences of `seq_len` tokens."""
    return ValidationSet(lambda: validation_batches(shards, seq_len, batch), shards.n_tokens, shards.n_bytes)


def _open(folder: Path, console: Console, verify: bool) -> ShardSet:
    if not verify:
        return ShardSet.open(folder, verify="size")
    shards = read_manifest(folder).shards
    size = sum(record.bytes for shard in shards for record in (shard.tokens, shard.index))
    if size <= CHECKSUM_LIMIT:
        return ShardSet.open(folder, verify="checksums")
    found = ShardSet.open(folder, verify="size")
    print_line(
        console,
        f"{folder} is large ({format_bytes(size)}): only the sizes of its files were checked; "
        f"n data verify {shlex.quote(str(folder))} checks every byte.",
    )
    return found


def _folders(data: DataConfig, tokenizer: Tokenizer, data_root: Path, console: Console) -> tuple[Path, Path | None]:
    if data.path is not None:
        nested = (data.path / "train").is_dir()
        train = data.path / "train" if nested else data.path
        val = data.val_path
        if val is None and nested and (data.path / "val").is_dir():
            val = data.path / "val"
        return train, val
    if data.corpus is None:
        raise UsageError(
            "expected data.path or data.corpus, found neither: prepare text with `n data prep FILES --output DIR` and "
            "add --set data.path=DIR, or try --set data.corpus=pydoc with the byte tokenizer"
        )
    folder = data_root / f"{data.corpus}-{tokenizer.name}"
    if not folder.exists():
        print_line(console, f"Preparing {folder}: {corpus_description(data.corpus)}.")
    prepared = prepare_corpus(data.corpus, tokenizer, data_root)
    return prepared / "train", data.val_path or prepared / "val"
