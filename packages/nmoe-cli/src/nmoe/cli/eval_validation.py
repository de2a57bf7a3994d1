"""`n eval`'s task `validation`: a run's validation set, every token scored once."""

import sqlite3

from nmoe.cli.console import print_line, print_summary
from nmoe.cli.context import Context
from nmoe.cli.errors import UsageError
from nmoe.cli.eval_model import EvalModel, Plan
from nmoe.cli.eval_request import EvalRequest
from nmoe.cli.open_model import OpenModel
from nmoe.cli.run_data import RunData, open_run_data, validation_set
from nmoe.cli.tokenizer_name import check_same_tokenizer, model_tokenizer
from nmoe.data.schema import DataConfig
from nmoe.eval.validation import ValidationResult, validate
from nmoe.train.checkpointer import newest_complete
from nmoe.train.errors import TrainError
from nmoe.train.experiments import Experiments
from nmoe.train.run_folder import RunFolder


def show_validation(request: EvalRequest, plan: Plan, measured: EvalModel, context: Context) -> None:
    """Scores a validation set, the run's own or the one that is asked for, in windows of the plan's length; rank 0
    prints what came of it, and records it, if it is what the run itself would measure of its last state.

    Raises:
        UsageError: there is no validation set.
        DataError: it is damaged, or of another tokenizer.
    """
    opened, data, length = measured.opened, request.data, plan.length
    config = opened.config
    if data is not None:
        model_tokenizer(opened.folder, request.tokenizer)  # refuses to go without one
        name = request.tokenizer if request.tokenizer is not None else opened.folder.document("tokenizer")["name"]
        nested = (data / "val").is_dir()
        section = DataConfig(tokenizer=name, path=data, val_path=None if nested else data)
    elif config is not None:
        section = config.data
    else:
        raise UsageError(f"{request.run} is no run and names no data: add --data DIR (n data prep makes one)")
    tokens = open_run_data(section, opened.model.config.vocab_size, length, context)
    check_same_tokenizer(opened.folder, tokens.tokenizer)
    if tokens.val is None:
        raise UsageError("the run's data has no validation set: add --data DIR")
    masking = config is not None and config.data.document_masking
    windows = validation_set(tokens.val, length, request.batch_size, document_masking=masking)
    result = validate(opened.model, windows, request.limit, measured.world)
    measured.settle()
    if measured.world.rank != 0:
        return
    rows = [
        ("model", str(opened.located.folder)),
        ("data", f"{tokens.val}, {result.n_tokens:,} tokens in windows of {length}"),
        ("val/loss", f"{result.loss:.4f} nats a token"),
        ("val/bpb", f"{result.bpb:.4f} bits a byte"),
    ]
    gzip = tokens.val.gzip_bits_per_byte
    if gzip is not None:
        rows.append(("gzip -9", f"{gzip:.4f} bits a byte on the same text"))
    print_summary(context.console, f"Evaluation of {request.run}", rows)
    if data is None and request.limit is None and config is not None and length == config.train.seq_len:
        _record(opened, tokens, result, context)


def _record(opened: OpenModel, tokens: RunData, result: ValidationResult, context: Context) -> None:
    """Puts the result in the database, if it is what the run itself would measure of its last state."""
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
