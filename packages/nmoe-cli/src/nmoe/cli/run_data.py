"""Opens what a configuration's `[data]` section names: tokenizer, shard sets, plan, batches, validation set."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nmoe.cli.console import print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import UsageError
from nmoe.cli.mixtures import load_mixture, prepared_tokens, source_folder, training_set
from nmoe.cli.units import format_bytes
from nmoe.data.corpus import corpus_description, prepare_corpus
from nmoe.data.documents import Documents, document_starts
from nmoe.data.errors import MissingShardSetError
from nmoe.data.guards import check_apart, check_shared_documents, check_tokenizer, check_vocabulary
from nmoe.data.loader import Loader, mixture_fingerprint, validation_batches
from nmoe.data.manifest import read_manifest
from nmoe.data.mixture import Mixture, read_budgets
from nmoe.data.plan import Plan, make_plan
from nmoe.data.schema import DataConfig
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import Tokenizer, load_tokenizer
from nmoe.eval.validation import Batch, ValidationSet
from rich.console import Console

CHECKSUM_LIMIT = 1 << 30
"""Bytes of a shard set up to which every start checks each of them, and a mixture's together: a second or two of
SHA-256. Up to as many, documents are compared with those of validation too."""

ONLY_SOURCE = "data"
"""What a plan calls a shard set that is trained on alone."""


@dataclass(frozen=True)
class Validation:
    """What a run validates on: one set, or that of each source of a mixture."""

    sets: tuple[ShardSet, ...]

    def __str__(self) -> str:
        return ", ".join(str(shards.path) for shards in self.sets)

    @property
    def n_tokens(self) -> int:
        """Of all sets."""
        return sum(shards.n_tokens for shards in self.sets)

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What gzip -9 makes of all of it; None where that was not measured."""
        measured = [(shards.manifest.gzip_bits_per_byte, shards.n_bytes) for shards in self.sets]
        bits = [figure * n_bytes for figure, n_bytes in measured if figure is not None]
        return sum(bits) / sum(n_bytes for _, n_bytes in measured) if len(bits) == len(measured) else None


@dataclass(frozen=True)
class RunData:
    """Tokens of a run, checked against tokenizer and model."""

    tokenizer: Tokenizer
    train: Mapping[str, ShardSet]
    """By source; the only one is called `data`."""
    val: Validation | None
    """None: nothing is validated."""
    plan: Plan | None
    """None: one shard set is trained on alone."""

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens and, of a mixture, their order up to the seed: as the loader's."""
        return self.train[ONLY_SOURCE].fingerprint if self.plan is None else mixture_fingerprint(self.plan, self.train)

    def loader(self, seq_len: int, seed: int) -> Loader:
        """What orders the samples."""
        if self.plan is None:
            return Loader(self.train[ONLY_SOURCE], seq_len, seed)
        return Loader.of_plan(self.plan, self.train, seed)


def open_run_data(data: DataConfig, vocab_size: int, seq_len: int, context: Context, *, verify: bool = True) -> RunData:
    """Opens the data of a run; a built-in corpus is prepared on first use, and that is said.

    Sets of up to `CHECKSUM_LIMIT` bytes are compared with their checksums; of a larger one only the files' sizes are,
    and that is said too.

    Args:
        data: the `[data]` section.
        vocab_size: ids that the model knows.
        seq_len: tokens a sample, by which a mixture's stages are divided.
        context: the process: where data are kept, what placeholders stand for, where to speak.
        verify: False where another process of this run compares checksums.

    Raises:
        UsageError: the section names no data.
        DataError: the data is missing, damaged, of another tokenizer, or validation's too.
    """
    tokenizer, console = load_tokenizer(data.tokenizer), context.console
    plan = None
    if data.mixture is None:
        train_folder, val_folder = _folders(data, tokenizer, context)
        train_folders, val_folders = {ONLY_SOURCE: train_folder}, [val_folder] if val_folder is not None else []
    else:
        plan = plan_data(data, seq_len, context, tokenizer=tokenizer)
        prepared = _prepared_folders(data.mixture, plan, data, tokenizer, context)
        train_folders = {name: training_set(prepared[name]) for name in plan.sources}
        val_folders = [prepared[name] / "val" for name in plan.sources if (prepared[name] / "val").is_dir()]
        val_folders = [data.val_path] if data.val_path is not None else val_folders
    limit = CHECKSUM_LIMIT // len(train_folders)
    train = {name: _open(folder, console, verify, limit) for name, folder in train_folders.items()}
    val = [_open(folder, console, verify, CHECKSUM_LIMIT // len(val_folders)) for folder in val_folders]
    for shards in (*train.values(), *val):
        check_tokenizer(shards, tokenizer)
        check_vocabulary(shards, vocab_size)
    for shards in val:
        check_apart([*train.values()], shards)
        if verify and sum(_size(each) for each in (*train.values(), shards)) <= CHECKSUM_LIMIT:
            check_shared_documents([*train.values()], shards)
    return RunData(tokenizer, train, Validation(tuple(val)) if val else None, plan)


def plan_data(
    data: DataConfig,
    seq_len: int,
    context: Context,
    *,
    tokenizer: Tokenizer | None = None,
    run_samples: int | None = None,
) -> Plan:
    """What a run draws from each source; sources need not be prepared.

    Args:
        data: the `[data]` section.
        seq_len: tokens a sample.
        context: the process.
        tokenizer: the section's, where it is loaded already.
        run_samples: what the run takes, to be counted where stages have no end.

    Raises:
        UsageError: the section names no data.
        MixtureError, PlanError: the mixture's or the flow's file makes no sense, or both do not go together.
    """
    tokenizer = load_tokenizer(data.tokenizer) if tokenizer is None else tokenizer
    if data.mixture is None:
        folder = data.path if data.path is not None else context.data_root / f"{data.corpus}-{tokenizer.name}"
        if data.path is None and data.corpus is None:
            raise _no_data()
        content = {"source": [{"name": ONLY_SOURCE, "path": str(folder), "weight": 1}]}
        mixture = Mixture.model_validate(content)
        return make_plan(mixture, {ONLY_SOURCE: prepared_tokens(folder)}, seq_len, run_samples=run_samples)
    mixture = load_mixture(data.mixture, context.environ)
    tokens = {
        source.name: prepared_tokens(source_folder(source, data.mixture, data.flow, tokenizer.name, context.data_root))
        for source in mixture.source
    }
    budgets = None if data.flow is None else read_budgets(data.flow_profiles, data.flow, mixture)
    return make_plan(mixture, tokens, seq_len, budgets=budgets, stage=data.stage, run_samples=run_samples)


def prep_mixture_command(data: DataConfig) -> str:
    """What prepares the sources of the section's mixture, after the name of this program."""
    words = ["data", "prep-mixture", "--mixture", str(data.mixture)]
    if data.flow is not None:
        words += ["--flow", data.flow]
        if data.flow_profiles != DataConfig.model_fields["flow_profiles"].default:
            words += ["--flow-profiles", str(data.flow_profiles)]
    return shlex.join([*words, "--tokenizer", data.tokenizer])


def documents_of(data: DataConfig, tokenizer: Tokenizer) -> Documents | None:
    """What the section hides of samples; None: nothing."""
    if not (data.document_masking or data.loss_mask_eos):
        return None
    return Documents(tokenizer.eos_id, masking=data.document_masking, loss_mask_eos=data.loss_mask_eos)


def validation_set(val: Validation, seq_len: int, batch: int, *, document_masking: bool = False) -> ValidationSet:
    """Shard sets as the evaluator takes them, in batches of `batch` sequences of `seq_len` tokens, of the sets in
    turn."""
    eos_id = val.sets[0].eos_id
    return ValidationSet(
        lambda: _in_turn([validation_batches(shards, seq_len, batch) for shards in val.sets]),
        val.n_tokens,
        sum(shards.n_bytes for shards in val.sets),
        (lambda input_BS: document_starts(input_BS, eos_id)) if document_masking else None,
    )


def _in_turn(several: list[Iterator[Batch]]) -> Iterator[Batch]:
    while several:
        for batches in several.copy():
            batch = next(batches, None)
            if batch is None:
                several.remove(batches)
            else:
                yield batch


def _open(folder: Path, console: Console, verify: bool, limit: int) -> ShardSet:
    if not verify:
        return ShardSet.open(folder, verify="size")
    shards = read_manifest(folder).shards
    size = sum(record.bytes for shard in shards for record in (shard.tokens, shard.index))
    if size <= limit:
        return ShardSet.open(folder, verify="checksums")
    found = ShardSet.open(folder, verify="size")
    print_line(
        console,
        f"{folder} is large ({format_bytes(size)}): only the sizes of its files were checked; "
        f"n data verify --checksums {shlex.quote(str(folder))} checks every byte.",
    )
    return found


def _size(shards: ShardSet) -> int:
    return sum(shard.tokens.bytes for shard in shards.manifest.shards)


def _prepared_folders(
    path: Path, plan: Plan, data: DataConfig, tokenizer: Tokenizer, context: Context
) -> dict[str, Path]:
    """The folder of every source that is drawn from. All that are missing are told at once, with what prepares them."""
    folders = {
        source.name: source_folder(source, path, data.flow, tokenizer.name, context.data_root)
        for source in load_mixture(path, context.environ).source
        if source.name in plan.sources
    }
    lacking = [f"{name} ({folder})" for name, folder in folders.items() if not folder.exists()]
    if lacking:
        raise MissingShardSetError(
            str(path),
            expected="sources that are prepared",
            found=f"nothing of {', '.join(lacking)}",
            remedy=f"Prepare them: {context.command} {prep_mixture_command(data)}",
        )
    return folders


def _folders(data: DataConfig, tokenizer: Tokenizer, context: Context) -> tuple[Path, Path | None]:
    if data.path is not None:
        nested = (data.path / "train").is_dir()
        train = data.path / "train" if nested else data.path
        val = data.val_path
        if val is None and nested and (data.path / "val").is_dir():
            val = data.path / "val"
        return train, val
    if data.corpus is None:
        raise _no_data()
    folder = context.data_root / f"{data.corpus}-{tokenizer.name}"
    if not folder.exists():
        print_line(context.console, f"Preparing {folder}: {corpus_description(data.corpus)}.")
    prepared = prepare_corpus(data.corpus, tokenizer, context.data_root)
    return prepared / "train", data.val_path or prepared / "val"


def _no_data() -> UsageError:
    return UsageError(
        "expected data.path, data.mixture or data.corpus, found none: prepare text with `n data prep FILES --output "
        "DIR` and add --set data.path=DIR, or try --set data.corpus=pydoc with the byte tokenizer"
    )
