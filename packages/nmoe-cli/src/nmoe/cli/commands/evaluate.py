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
    gpus: Annotated[
        int | None,
        Parameter(
            help="Measure on so many GPUs of this machine; left out: on one, or on as many CPU ranks as the run."
        ),
    ] = None,
    context: Injected,
) -> int:
    """Measure a model: by default, validation loss and bits per byte, every validation token scored once.

    `n runs` shows the validation loss if it is the run's own: of its newest checkpoint, on its data, as it was trained.
    Results of other tasks are a table on screen, files on disk, and rows in the experiments database.
    """
    from nmoe.cli.errors import UsageError

    if list_tasks:
        _list(context)
        return 0
    names = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    if run is None:
        raise UsageError("expected a model to measure, found none: name a run or a folder, or add --list")
    if not names:
        raise UsageError("expected --tasks with a name at least, found none: --list says which there are")
    numbers = (("--limit", limit), ("--max-tokens", max_tokens), ("--seq-len", seq_len), ("--gpus", gpus))
    for option, value in numbers:
        if value is not None and value < 1:
            raise UsageError(f"{option}: expected 1 or more, found {value}")
    from nmoe.cli.eval_request import EvalRequest
    from nmoe.cli.eval_run import run_evaluation

    request = EvalRequest(
        run, tuple(names), limit, data, out, allow_missing, unsafe_exec, max_tokens, tokenizer, seq_len, batch_size,
        device, kernels, gpus,
    )  # fmt: skip
    if data is not None and 0 < len(request.benchmarks) < len(names):
        raise UsageError(
            "--data is either a text, for validation and bpb, or other tasks' data: call n eval once for each"
        )
    return run_evaluation(request, context)


def _list(context: Context) -> None:
    from nmoe.cli.console import print_table
    from nmoe.cli.eval_request import BITS_PER_BYTE
    from nmoe.eval.registry import entries
    from nmoe.eval.schema import VALIDATION

    rows = [
        (VALIDATION, "", "", "loss and bits a byte of the run's validation set, end-of-text tokens included"),
        (BITS_PER_BYTE, "1", "", "bits a byte of any shard set, whatever its tokenizer"),
    ]
    rows += [(entry.name, entry.version, entry.shots, entry.about) for entry in entries().values()]
    print_table(context.console, ("task", "version", "shots", "what it is"), rows)
