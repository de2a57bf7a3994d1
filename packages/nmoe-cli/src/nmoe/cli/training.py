"""Composes a training run: ranks, data, run folder, database, trainer."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

from nmoe.cli.composition import Composition
from nmoe.cli.console import print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import ExitCode
from nmoe.cli.eval_inputs import open_run_suites
from nmoe.cli.exit_codes import exit_code_of
from nmoe.cli.place import Place, check_gpus, end_with_launcher, place_of
from nmoe.cli.ranks import train_on_ranks
from nmoe.cli.recording import RecordingReporter
from nmoe.cli.reporter import NullReporter, make_reporter
from nmoe.cli.run_inputs import (
    Inputs,
    Request,
    check_continuation,
    open_inputs,
    open_loader,
    open_parent,
    parse_profile,
    recorded,
    resume_hint,
)
from nmoe.cli.toml_writer import dump_toml
from nmoe.model.checkpoint import TensorFolder, open_folder
from nmoe.rdep.world import World, alone
from nmoe.train.checkpointer import load, newest_complete, step_of
from nmoe.train.environment import environment, git_commit
from nmoe.train.errors import NonFiniteError, TrainError
from nmoe.train.experiments import EndStatus, Experiments
from nmoe.train.run_folder import RunFolder, new_run_id
from rich.console import Console

_VERIFY_S = 86_400.0


def run_training(request: Request, context: Context) -> int:
    """Trains as requested; returns the exit code. What can be refused is refused before anything is written.

    Of several ranks, this process becomes the one that the environment says, or else starts them all.

    Raises:
        UsageError: the request contradicts itself or what is on disk.
        EnvironmentNotReadyError: there are fewer GPUs than ranks.
        Any error of data, checkpoints or trainer; the database then says how the run ended.
    """
    runtime = request.loaded.config.runtime
    place = place_of(context.environ, runtime.world_size)
    if place is not None:
        return _run_rank(request, context, place)
    check_gpus(runtime.device, runtime.world_size, f"runtime.world_size = {runtime.world_size}")
    if runtime.world_size > 1:
        return train_on_ranks(request, context)
    return _lead(request, context, alone(runtime.device), None)


def _run_rank(request: Request, context: Context, place: Place) -> int:
    """One rank of several. The world is left in peace only where all went well: where it did not, others may be stuck,
    and the process must end without waiting for them."""
    if place.lifeline is not None:
        end_with_launcher(place.lifeline)
    config = request.loaded.config
    world = place.join(config.runtime.device, config.rdep.timeout_s)
    code = _lead(request, context, world, place) if place.rank == 0 else _follow(request, context, world)
    world.close()
    return code


def _lead(request: Request, context: Context, world: World, place: Place | None) -> int:
    """The only rank, or rank 0 of several: it alone writes the run's folder and the database, and speaks."""
    config, console = request.loaded.config, context.console
    told = place is not None and place.trusts
    run = RunFolder(context.data_root, request.run_id or new_run_id())
    inputs = open_inputs(request, run, _silent(context) if told else context, verify=not told)
    parent = inputs.parent
    suites = open_run_suites(config.eval, context)
    resolved, env = dump_toml(request.loaded.resolved), environment()
    env["threads"]["intra_op"] = config.runtime.threads or env["threads"]["intra_op"]
    if inputs.data.val is None and "validation" in config.eval.tasks and not told:
        print_line(console, "Nothing is validated: the data have no validation set, and data.val_path names none")
    if not inputs.continues:
        run.create(resolved, env)
    with run.lock(), Experiments(context.data_root / "experiments.db") as experiments:
        checkpoint = _newest(run) if inputs.continues else None
        if inputs.continues:
            check_continuation(request, inputs, experiments, checkpoint, context)
            row = recorded(experiments, run)
            if checkpoint is None and row is not None and row.parent_run is not None:
                # It was stopped before its first checkpoint. The parent as --from named it:
                spec = row.parent_run if row.parent_step is None else f"{row.parent_run}@{row.parent_step}"
                parent = open_parent(spec, config, inputs.data, context, verify=True)
            run.rewrite(resolved, env)
        experiments.start(
            run.run_id,
            experiment=request.path.stem,
            config=resolved,
            steps=config.train.steps,
            step=0 if checkpoint is None else step_of(checkpoint.path),
            git_commit=git_commit(),
            parent_run=parent.name if parent else None,
            parent_step=parent.step if parent else None,
        )
        start_from = parent.folder if parent else None
        reporter = RecordingReporter(make_reporter(console), experiments)
        composition = Composition(request, context, inputs, world, reporter, suites, reporter.keep)
        try:
            _share(world, run, checkpoint, start_from)
            outcome = composition.train(checkpoint, start_from)
            experiments.update(run.run_id, step=outcome.step, train_loss=outcome.loss)
        except BaseException as error:
            _record_failure(experiments, run, error, context)
            if exit_code_of(error) is not ExitCode.BUG and (place is None or place.lifeline is None):
                print_line(context.error_console, f"The run is in {run.path}; {resume_hint(request, run, context)}")
            raise
        status: EndStatus = "interrupted" if outcome.status == "interrupted" else "finished"
        experiments.finish(run.run_id, status, outcome.status)
    if outcome.status == "interrupted":
        saved = config.checkpoint.enabled and outcome.step > 0
        kept = f"which is saved; {resume_hint(request, run, context)}" if saved else "and nothing is saved"
        print_line(console, f"Stopped after step {outcome.step}, {kept}")
        return 128 + (outcome.signal or 0)
    composition.summarise(outcome)
    return ExitCode.OK


def _follow(request: Request, context: Context, world: World) -> int:
    """Any other rank: it computes what rank 0 says, and neither writes nor speaks."""
    context = _silent(context)
    # Rank 0 reads all of a checkpoint first: however long that takes, whoever started the ranks sees it if it dies.
    run_id, checkpoint, start_from = json.loads(world.share("run", b"", _VERIFY_S)[0])
    data, loader = open_loader(request.loaded.config, context, verify=False)
    run = RunFolder(context.data_root, run_id)
    inputs = Inputs(run, True, data, loader, None, parse_profile(request.profile))  # rank 0 has made the run
    suites = open_run_suites(request.loaded.config.eval, context)
    composition = Composition(request, context, inputs, world, NullReporter(), suites)
    outcome = composition.train(_open(checkpoint), _open(start_from))
    return 128 + (outcome.signal or 0) if outcome.status == "interrupted" else ExitCode.OK


def _share(world: World, run: RunFolder, checkpoint: TensorFolder | None, start_from: TensorFolder | None) -> None:
    """Rank 0 tells the others what it found on disk, which may since have changed by its own doing."""
    paths = [None if folder is None else str(folder.path.absolute()) for folder in (checkpoint, start_from)]
    world.share("run", json.dumps([run.run_id, *paths]).encode())


def _open(path: str | None) -> TensorFolder | None:
    return None if path is None else open_folder(Path(path), verify=False)  # rank 0 has verified it


def _silent(context: Context) -> Context:
    return replace(context, console=Console(quiet=True))


def _record_failure(experiments: Experiments, run: RunFolder, error: BaseException, context: Context) -> None:
    try:
        experiments.finish(run.run_id, _status_after(error), str(error) or type(error).__name__)
    except (TrainError, sqlite3.Error, OSError) as other:  # a full disk, say: what ended the run is the one to tell
        print_line(context.error_console, f"The experiments database could not be written: {other}")


def _newest(run: RunFolder) -> TensorFolder | None:
    path = newest_complete(run.checkpoints)
    return None if path is None else load(path)


def _status_after(error: BaseException) -> EndStatus:
    if isinstance(error, NonFiniteError):
        return "diverged"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
