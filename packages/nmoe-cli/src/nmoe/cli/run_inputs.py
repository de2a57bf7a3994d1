"""What a training run starts from: asked for on the command line, opened and checked before anything is written."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from nmoe.cli.config import LoadedConfig, RunConfig, load_config
from nmoe.cli.console import print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import UsageError
from nmoe.cli.fingerprint import diff, identity_fields, operational_fields
from nmoe.cli.locate import locate_model
from nmoe.cli.run_data import RunData, open_run_data
from nmoe.cli.tokenizer_name import check_same_tokenizer
from nmoe.data.loader import Loader
from nmoe.model.checkpoint import TensorFolder, open_folder
from nmoe.model.errors import WeightsMismatchError
from nmoe.model.weights import config_document, read_config, shape_problems
from nmoe.train.checkpointer import load
from nmoe.train.errors import MissingCheckpointsError, UnknownRunError
from nmoe.train.experiments import Experiments, RunRow
from nmoe.train.loop import Status
from nmoe.train.run_folder import RunFolder
from nmoe.train.state import check_identity
from pydantic import JsonValue


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    path: Path
    """The configuration file; its name is the experiment's."""
    loaded: LoadedConfig
    run_id: str | None
    resume: bool | None
    start_from: str | None
    profile: str | None

    def arguments(self, run: RunFolder) -> list[str]:
        """Of `n`, to start `run` or to continue it."""
        sets = [part for value in self.loaded.sets for part in ("--set", value)]
        return ["train", str(self.path), *sets, "--run-id", run.run_id]

    def options(self) -> list[str]:
        """Of `n train`, what is asked for besides: it is said once, and not again when the run is continued."""
        options = [] if self.resume is None else ["--resume" if self.resume else "--no-resume"]
        for name, value in (("--from", self.start_from), ("--profile", self.profile)):
            options += [] if value is None else [name, value]
        return options


@dataclass(frozen=True)
class Parent:
    """The model that a run starts from."""

    name: str
    """A run's id, or the folder of an imported model."""
    step: int | None
    folder: TensorFolder


@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, but for a checkpoint of its own."""

    run: RunFolder
    continues: bool
    """Whether the run exists."""
    data: RunData
    loader: Loader
    parent: Parent | None
    """None: the run starts with random weights, or goes on with its own."""
    profile: tuple[int, int] | None

    def identity(self, config: RunConfig) -> dict[str, JsonValue]:
        """What must not change at resume."""
        return {**identity_fields(config), "data": self.loader.fingerprint}


def open_inputs(request: Request, run: RunFolder, context: Context, *, verify: bool = True) -> Inputs:
    """Opens what a run reads; differences of the `[model]` section from a parent's are told.

    Args:
        request: what the command line asked for.
        run: the run's folder, which need not exist.
        context: the process.
        verify: False where another process of this run compares checksums.

    Raises:
        UsageError: the request contradicts itself or what is on disk.
        Any error of data or checkpoints.
    """
    profile = parse_profile(request.profile)
    continues = _continues(request, run)
    config = request.loaded.config
    data, loader = open_loader(config, context, verify=verify)
    parent = open_parent(request.start_from, config, data, context, verify=verify) if request.start_from else None
    return Inputs(run, continues, data, loader, parent, profile)


def open_loader(config: RunConfig, context: Context, *, verify: bool) -> tuple[RunData, Loader]:
    """Opens the data and what orders them.

    Raises:
        UsageError: the target is of something that nothing measures.
        DataError: data are missing, damaged, of another tokenizer, or fewer than the run's steps take.
    """
    data = open_run_data(config.data, config.model.vocab_size, config.train.seq_len, context, verify=verify)
    if config.train.target_loss is not None and (data.val is None or "validation" not in config.eval.tasks):
        raise UsageError("train.target_loss is of the validation loss, and nothing is validated: set data.val_path")
    if data.plan is not None:
        data.plan.check_length(config.train.steps * config.train.batch_size)
    return data, data.loader(config.train.seq_len, config.runtime.seed)


def open_parent(spec: str, config: RunConfig, data: RunData, context: Context, *, verify: bool) -> Parent:
    """Opens and checks the model that `spec` names, a run or a folder.

    Raises:
        WeightsMismatchError: its weights have other shapes.
        Any error of checkpoints.
    """
    located = locate_model(spec, context.data_root)
    folder = load(located.folder) if verify else open_folder(located.folder, verify=False)
    check_same_tokenizer(folder, data.tokenizer)
    problems = shape_problems(folder, config.model)
    if problems:
        raise WeightsMismatchError(folder.path, problems)
    before, now = config_document(read_config(folder)), config_document(config.model)
    for change in diff(before, now):
        print_line(context.console, f"model.{change.key}: {change.old} in {spec}, {change.new} here")
    return Parent(located.run.run_id if located.run else str(located.folder), located.step, folder)


def check_continuation(
    request: Request, inputs: Inputs, experiments: Experiments, checkpoint: TensorFolder | None, context: Context
) -> None:
    """Refuses to go on with a run that has ended, or under settings that change what it computes; tells the operational
    keys that changed.

    Raises:
        UsageError: the run has ended.
        IdentityMismatchError: keys or data differ; lists each, old and new.
        MissingCheckpointsError: it was saved, and no checkpoint is there.
    """
    run, config = inputs.run, request.loaded.config
    before = load_config(run.config, environ=context.environ).config
    row = recorded(experiments, run)
    same_target = before.train.target_loss == config.train.target_loss
    if row is not None and row.status == "finished":
        if row.message == "target_reached" and same_target:
            raise UsageError(f"run {row.run_id} reached its target loss at step {row.step}: leave out --run-id")
        if row.message != "target_reached" and config.train.steps <= row.step:
            raise UsageError(
                f"run {row.run_id} has its {row.step} steps: add --set train.steps=… to go on at the learning rate "
                f"that its schedule ends with, or start a new run, from nothing or with --from {row.run_id}"
            )
    if checkpoint is None and row is not None and _was_saved(row, before):
        raise MissingCheckpointsError(run.checkpoints, row.step)
    if checkpoint is not None:
        check_identity(checkpoint.document("identity"), inputs.identity(config))
    for change in diff(operational_fields(before), operational_fields(config)):
        print_line(context.console, f"{change.key}: {change.old} before, {change.new} now")


def _was_saved(row: RunRow, config: RunConfig) -> bool:
    """Whether a run has been saved for certain: it ended as it should, or made a step after its second checkpoint was
    begun, which waits for the first. A run that was killed while it wrote its first one begins anew."""
    if not config.checkpoint.enabled or row.step == 0:
        return False
    every = config.checkpoint.every
    return (every is not None and row.step > 2 * every) or row.message in get_args(Status)


def recorded(experiments: Experiments, run: RunFolder) -> RunRow | None:
    """What the database says of a run; None if it does not know it."""
    try:
        return experiments.get(run.run_id)
    except UnknownRunError:
        return None


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """First and last step of a profiler trace.

    Raises:
        UsageError: they are none.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UsageError(f"expected --profile START:STOP with 1 ≤ START ≤ STOP, found {text!r}")
    return int(first), int(last)


def _continues(request: Request, run: RunFolder) -> bool:
    exists = run.config.is_file()
    if request.resume is True and not exists:
        run.open()  # says which runs there are
    if request.resume is False and exists:
        raise UsageError(
            f"run {run.run_id} exists, in {run.path}: leave out --no-resume to continue it, or give another --run-id"
        )
    if exists and request.start_from is not None:
        raise UsageError(f"--from starts a new run, and {run.run_id} exists: give another --run-id, or none")
    return exists


def resume_hint(request: Request, run: RunFolder, context: Context) -> str:
    """How to continue the run, for a person to copy."""
    return f"continue it with:\n  {context.command} {shlex.join(request.arguments(run))}"
