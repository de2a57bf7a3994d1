"""`n eval`: measures a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from nmoe.cli.context import Context, Injected
from nmoe.cli.options import DeviceName, KernelsName, ModelName, TokenizerName

if TYPE_CHECKING:
    from nmoe.cli.open_model import OpenModel
    from nmoe.cli.run_data import RunData
    from nmoe.eval.validation import ValidationResult


def evaluate(
    run: ModelName,
    /,
    *,
    data: Annotated[
        Path | None, Parameter(help="A prepared folder (its val/) or a shard set; the run's own if left out.")
    ] = None,
    tokenizer: TokenizerName = None,
    seq_len: Annotated[int | None, Parameter(help="Tokens a window; the run's own if left out.")] = None,
    batch_size: Annotated[int, Parameter(help="Windows at once.")] = 8,
    device: DeviceName = None,
    kernels: KernelsName = None,
    context: Injected,
) -> None:
    """Measure validation loss and bits per byte, every validation token scored once.

    `n runs` shows the result if it is the run's own: of its newest checkpoint, on its data, as it was trained.
    """
    from nmoe.cli.console import print_summary
    from nmoe.cli.errors import UsageError
    from nmoe.cli.open_model import open_model
    from nmoe.cli.run_data import open_run_data, validation_set
    from nmoe.cli.tokenizer_name import check_same_tokenizer, model_tokenizer
    from nmoe.data.schema import DataConfig
    from nmoe.eval.validation import validate

    opened = open_model(run, context, device, kernels)
    config = opened.config
    if data is not None:
        model_tokenizer(opened.folder, tokenizer)  # refuses to go without one
        name = tokenizer if tokenizer is not None else opened.folder.document("tokenizer")["name"]
        nested = (data / "val").is_dir()
        section = DataConfig(tokenizer=name, path=data, val_path=None if nested else data)
    elif config is not None:
        section = config.data
    else:
        raise UsageError(f"{run} is no run and names no data: add --data DIR (n data prep makes one)")
    length = seq_len or (config.train.seq_len if config else None)
    if length is None:
        raise UsageError(f"{run} is no run and names no sequence length: add --seq-len")
    tokens = open_run_data(section, opened.model.config.vocab_size, length, context)
    check_same_tokenizer(opened.folder, tokens.tokenizer)
    if tokens.val is None:
        raise UsageError("the run's data has no validation set: add --data DIR")
    masking = config is not None and config.data.document_masking
    result = validate(opened.model, validation_set(tokens.val, length, batch_size, document_masking=masking))
    rows = [
        ("model", str(opened.located.folder)),
        ("data", f"{tokens.val}, {result.n_tokens:,} tokens in windows of {length}"),
        ("val/loss", f"{result.loss:.4f} nats a token"),
        ("val/bpb", f"{result.bpb:.4f} bits a byte"),
    ]
    gzip = tokens.val.gzip_bits_per_byte
    if gzip is not None:
        rows.append(("gzip -9", f"{gzip:.4f} bits a byte on the same text"))
    print_summary(context.console, f"Evaluation of {run}", rows)
    if data is None and seq_len in (None, config.train.seq_len if config else None):
        _record(opened, tokens, result, context)


def _record(opened: "OpenModel", tokens: "RunData", result: "ValidationResult", context: Context) -> None:
    """Puts the result in the database, if it is what the run itself would measure of its last state."""
    import sqlite3

    from nmoe.cli.console import print_line
    from nmoe.train.checkpointer import newest_complete
    from nmoe.train.errors import TrainError
    from nmoe.train.experiments import Experiments
    from nmoe.train.run_folder import RunFolder

    run, config = opened.located.run, opened.config
    if run is None or config is None or not opened.as_trained or config.eval.max_sequences is not None:
        return
    if run.path.resolve() != RunFolder(context.data_root, run.run_id).path.resolve():
        return
    newest = newest_complete(run.checkpoints)
    if newest is None or newest.resolve() != opened.located.folder.resolve():
        return
    if opened.folder.document("identity").get("data") != tokens.fingerprint:
        return  # what stands at the data's path is not what the run was trained on
    try:
        with Experiments(context.data_root / "experiments.db") as experiments:
            experiments.get(run.run_id)  # makes no database where there is none
            experiments.update(run.run_id, val_loss=result.loss, val_bpb=result.bpb)
    except (TrainError, sqlite3.Error, OSError) as error:
        print_line(context.error_console, f"The result stands, and `n runs` will not show it: {error}")
