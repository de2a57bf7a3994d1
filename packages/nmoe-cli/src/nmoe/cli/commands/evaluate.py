"""`n eval`: measures a checkpoint."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.context import Context, Injected
from nmoe.cli.options import DeviceName, KernelsName, TokenizerName


def evaluate(
    run: Annotated[str | None, Parameter(help="A run, RUN@STEP, or the folder of an imported model.")] = None,
    /,
    *,
    tasks: Annotated[str, Parameter(help="Names with commas between, as --list has them.")] = "validation",
    list_tasks: Annotated[bool, Parameter(name="--list", negative="", help="Say which tasks there are.")] = False,
    limit: Annotated[int | None, Parameter(help="Of each task the first so many examples (or windows).")] = None,
    data: Annotated[
        Path | None,
        Parameter(
            help="Of validation and bpb, a prepared folder (its val/) or a shard set, the run's own if left out. Of "
            "other tasks, the folder that holds their data: the data root if left out, and the Hugging Face hub."
        ),
    ] = None,
    out: Annotated[Path | None, Parameter(help="Folder for results; in the run's own if left out.")] = None,
    allow_missing: Annotated[
        bool, Parameter(negative="", help="Leave out tasks without data, and say that a score is partial.")
    ] = False,
    unsafe_exec: Annotated[
        bool, Parameter(negative="", help="Run programs that a model wrote outside of any sandbox.")
    ] = False,
    max_tokens: Annotated[int | None, Parameter(help="Tokens of a forward call.")] = None,
    tokenizer: TokenizerName = None,
    seq_len: Annotated[int | None, Parameter(help="Tokens that the model sees; the run's own if left out.")] = None,
    batch_size: Annotated[int, Parameter(help="Windows at once, of validation and bpb.")] = 8,
    device: DeviceName = None,
    kernels: KernelsName = None,
    context: Injected,
) -> None:
    """Measure a model: by default, validation loss and bits per byte, every validation token scored once.

    `n runs` shows the validation loss if it is the run's own: of its newest checkpoint, on its data, as it was trained.
    Results of other tasks are a table on screen, files on disk, and rows in the experiments database.
    """
    from nmoe.cli.errors import UsageError

    if list_tasks:
        _list(context)
        return
    names = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    if run is None:
        raise UsageError("expected a model to measure, found none: name a run or a folder, or add --list")
    if not names:
        raise UsageError("expected --tasks with a name at least, found none: --list says which there are")
    for option, value in (("--limit", limit), ("--max-tokens", max_tokens), ("--seq-len", seq_len)):
        if value is not None and value < 1:
            raise UsageError(f"{option}: expected 1 or more, found {value}")
    from nmoe.cli.eval_inputs import open_suites
    from nmoe.cli.eval_tasks import BITS_PER_BYTE
    from nmoe.cli.open_model import open_model
    from nmoe.eval.schema import VALIDATION

    benchmarks = [name for name in names if name not in (VALIDATION, BITS_PER_BYTE)]
    if data is not None and 0 < len(benchmarks) < len(names):
        raise UsageError(
            "--data is either a text, for validation and bpb, or other tasks' data: call n eval once for each"
        )
    suites = open_suites(benchmarks, data, context, allow_missing=allow_missing, unsafe_exec=unsafe_exec)
    opened = open_model(run, context, device, kernels)
    length = seq_len or (opened.config.train.seq_len if opened.config else None)
    if length is None:
        raise UsageError(f"{run} is no run and names no sequence length: add --seq-len")
    if VALIDATION in names:
        from nmoe.cli.eval_validation import show_validation

        show_validation(run, opened, context, data, tokenizer, length, batch_size, limit)
    measured = [name for name in names if name != VALIDATION]
    if not measured:
        return
    from nmoe.cli.console import print_line
    from nmoe.cli.eval_report import record, results_folder, show
    from nmoe.cli.eval_tasks import measure_tasks, measure_text, recorded_name

    wants_text = BITS_PER_BYTE in names
    text = measure_text(opened, context, data, tokenizer, length, batch_size, limit) if wants_text else []
    results = measure_tasks(opened, context, suites, tokenizer, length, max_tokens, limit, text)
    located = opened.located
    parent = located.folder if located.run is None else located.run.path
    folder = out if out is not None else results_folder(parent, located.step, measured, limit)
    show(context.console, results)
    results.write(folder)
    print_line(context.console, f"Results are in {folder}")
    record(results, recorded_name(opened, context), located.step, context)


def _list(context: Context) -> None:
    from nmoe.cli.console import print_table
    from nmoe.cli.eval_tasks import BITS_PER_BYTE
    from nmoe.eval.registry import entries
    from nmoe.eval.schema import VALIDATION

    rows = [
        (VALIDATION, "", "", "loss and bits a byte of the run's validation set, end-of-text tokens included"),
        (BITS_PER_BYTE, "1", "", "bits a byte of any shard set, whatever its tokenizer"),
    ]
    rows += [(entry.name, entry.version, entry.shots, entry.about) for entry in entries().values()]
    print_table(context.console, ("task", "version", "shots", "what it is"), rows)
