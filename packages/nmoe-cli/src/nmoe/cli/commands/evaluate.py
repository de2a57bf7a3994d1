"""`n eval`: measures a checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from nmoe.cli.context import Injected


def evaluate(
    run: Annotated[str, Parameter(help="A run, RUN@STEP, or the folder of an imported model.")],
    /,
    *,
    data: Annotated[
        Path | None, Parameter(help="A prepared folder (its val/) or a shard set; the run's own if left out.")
    ] = None,
    tokenizer: Annotated[str | None, Parameter(help="For a model that names none.")] = None,
    seq_len: Annotated[int | None, Parameter(help="Tokens a window; the run's own if left out.")] = None,
    batch_size: Annotated[int, Parameter(help="Windows at once.")] = 8,
    device: Annotated[Literal["cpu", "cuda"] | None, Parameter(help="The run's own if left out.")] = None,
    context: Injected,
) -> None:
    """Measure validation loss and bits per byte, every validation token scored once."""
    from nmoe.cli.console import print_summary
    from nmoe.cli.errors import UsageError
    from nmoe.cli.open_model import open_model
    from nmoe.cli.run_data import open_run_data, validation_set
    from nmoe.cli.tokenizer_name import tokenizer_name
    from nmoe.data.schema import DataConfig
    from nmoe.eval.validation import validate
    from nmoe.train.experiments import Experiments

    opened = open_model(run, context, device)
    config = opened.config
    if data is not None:
        nested = (data / "val").is_dir()
        section = DataConfig(
            tokenizer=tokenizer_name(opened.folder, tokenizer), path=data, val_path=None if nested else data
        )
    elif config is not None:
        section = config.data
    else:
        raise UsageError(f"{run} is no run and names no data: add --data DIR (n data prep makes one)")
    length = seq_len or (config.train.seq_len if config else None)
    if length is None:
        raise UsageError(f"{run} is no run and names no sequence length: add --seq-len")
    tokens = open_run_data(section, opened.model.config.vocab_size, context.data_root, context.console)
    if tokens.val is None:
        raise UsageError("the run's data has no validation set: add --data DIR")
    result = validate(opened.model, validation_set(tokens.val, length, batch_size))
    located = opened.located
    if located.run is not None and data is None and seq_len is None:
        with Experiments(context.data_root / "experiments.db") as experiments:
            experiments.update(located.run.run_id, val_loss=result.loss, val_bpb=result.bpb)
    rows = [
        ("model", str(located.folder)),
        ("data", f"{tokens.val.path}, {result.n_tokens:,} tokens in windows of {length}"),
        ("val/loss", f"{result.loss:.4f} nats a token"),
        ("val/bpb", f"{result.bpb:.4f} bits a byte"),
    ]
    gzip = tokens.val.manifest.gzip_bits_per_byte
    if gzip is not None:
        rows.append(("gzip -9", f"{gzip:.4f} bits a byte on the same text"))
    print_summary(context.console, f"Evaluation of {run}", rows)
