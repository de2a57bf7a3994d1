"""`n eval`'s tasks but `validation`, measured of a model on disk."""

import dataclasses
import time
from collections.abc import Sequence

from nmoe.cli.context import Context
from nmoe.cli.errors import UsageError
from nmoe.cli.eval_inputs import open_text, token_bytes
from nmoe.cli.eval_model import EvalModel, Plan
from nmoe.cli.eval_progress import eval_progress
from nmoe.cli.eval_request import BITS_PER_BYTE, EvalRequest
from nmoe.cli.open_model import OpenModel
from nmoe.cli.run_data import open_run_data
from nmoe.cli.tokenizer_name import model_tokenizer
from nmoe.eval.bits_per_byte import bits_per_byte
from nmoe.eval.requests import Metric
from nmoe.eval.results import Results, TaskResult
from nmoe.eval.runner import evaluate_suites
from nmoe.eval.sources import Suite
from nmoe.train.run_folder import RunFolder


def measure_tasks(
    request: EvalRequest,
    plan: Plan,
    measured: EvalModel,
    context: Context,
    suites: Sequence[Suite],
    text: list[TaskResult],
) -> Results:
    """What the tasks give, with a bar while it lasts.

    Args:
        request: what was asked for.
        plan: how it is met.
        measured: the model.
        context: the process.
        suites: the tasks.
        text: what was measured before, to stand first.

    Raises:
        UsageError: the tokenizer has ids that the model lacks.
        EvalError: a task cannot be measured.
    """
    opened = measured.opened
    model, vocabulary = opened.model, model_tokenizer(opened.folder, request.tokenizer)
    if vocabulary.n_vocab > model.config.vocab_size:
        raise UsageError(
            f"expected a tokenizer of at most {model.config.vocab_size} ids, found {vocabulary.name} with "
            f"{vocabulary.n_vocab}: give the one that the model was trained with"
        )
    with eval_progress(context.console) as progress:
        results = evaluate_suites(
            model,
            vocabulary,
            suites,
            max_length=plan.length,
            max_tokens=plan.max_tokens,
            limit=request.limit,
            world=measured.world,
            progress=progress,
        )
    measured.settle()
    weight = model.head.weight
    about = {
        "max_length": plan.length,
        "limit": request.limit,
        "device": weight.device.type,
        "dtype": str(weight.dtype),
        "ranks": measured.world.size,
    }
    return dataclasses.replace(
        results, tasks=(*text, *results.tasks), model=str(opened.located.folder.absolute()), about=about
    )


def measure_text(request: EvalRequest, plan: Plan, measured: EvalModel, context: Context) -> list[TaskResult]:
    """Bits per byte of the shard sets in a folder, or of the run's validation sets, one result a set.

    Raises:
        UsageError: there is no text.
        DataError: a set is damaged.
    """
    opened, data = measured.opened, request.data
    vocabulary = model_tokenizer(opened.folder, request.tokenizer)
    folders = [data] if data is not None else []
    if data is None and opened.config is not None:
        val = open_run_data(opened.config.data, opened.model.config.vocab_size, plan.length, context).val
        folders = [] if val is None else [shards.path for shards in val.sets]
    if not folders:
        raise UsageError("bpb: expected a text, found none: add --data DIR, a shard set or a prepared folder")
    found = []
    for folder in folders:
        began, text = time.monotonic(), open_text(folder, vocabulary, plan.length, request.batch_size)
        result = bits_per_byte(
            opened.model, text.windows, token_bytes(vocabulary), max_sequences=request.limit, world=measured.world
        )
        measured.settle()
        name = BITS_PER_BYTE if len(folders) == 1 else f"{BITS_PER_BYTE}/{folder.parent.name}"
        metric = Metric("bits_per_byte", result.value)
        seconds = time.monotonic() - began
        version = f"1, windows of {plan.length}"
        found.append(TaskResult(name, version, 0, text.fingerprint, (metric,), (), request.limit, seconds))
    return found


def recorded_name(opened: OpenModel, context: Context) -> str:
    """As the experiments database calls the model: a run of its own by its id, any other by its folder."""
    run = opened.located.run
    if run is not None and run.path.resolve() == RunFolder(context.data_root, run.run_id).path.resolve():
        return run.run_id
    return str((opened.located.folder if run is None else run.path).resolve())
