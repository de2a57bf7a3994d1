"""A run of several ranks, seen from the process that starts them."""

import sqlite3
from dataclasses import replace

from nmoe.cli.console import print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import ExitCode
from nmoe.cli.launch import Ended, Failure, run_ranks
from nmoe.cli.run_inputs import Request, check_continuation, open_inputs, recorded, resume_hint
from nmoe.model.checkpoint import open_folder
from nmoe.train.checkpointer import newest_complete
from nmoe.train.errors import TrainError
from nmoe.train.experiments import EndStatus, Experiments
from nmoe.train.run_folder import RunFolder, new_run_id
from rich.console import Console


def train_on_ranks(request: Request, context: Context) -> int:
    """Refuses once what each rank would refuse, starts the ranks, and tells how they ended; returns the exit code.

    Raises:
        UsageError: the request contradicts itself or what is on disk.
        Any error of data or checkpoints.
    """
    config = request.loaded.config
    inputs = open_inputs(request, RunFolder(context.data_root, request.run_id or new_run_id()), context)
    run, experiments = inputs.run, Experiments(context.data_root / "experiments.db")
    if inputs.continues:
        newest = newest_complete(run.checkpoints)
        checkpoint = None if newest is None else open_folder(newest, verify=False)  # rank 0 verifies it
        silent = replace(context, console=Console(quiet=True))  # rank 0 tells what changed
        with run.lock(), experiments:
            check_continuation(request, inputs, experiments, checkpoint, silent)
    ended = run_ranks(
        config.runtime.world_size,
        [*context.program, *request.arguments(run), *request.options()],
        {**context.environ, "NMOE_DATA_PATH": str(context.data_root)},
        run.path,
        context.console,
    )
    if ended.failure is None and not ended.is_cut_off:
        return ended.code  # rank 0 has said all
    begun = run.config.is_file()
    if ended.failure is not None:
        where = f"what each rank said is in {run.path / 'logs'}" if begun else "the run had not begun"
        tell_failure(ended, ended.failure, context, where)
    if begun:
        _record(ended, run, experiments, context)
        print_line(context.error_console, f"The run is in {run.path}; {resume_hint(request, run, context)}")
    elif ended.failure is None:
        print_line(context.error_console, "Stopped before the run began: nothing was written")
    return ended.code


def tell_failure(ended: Ended, failure: Failure, context: Context, what_now: str) -> None:
    """The failing rank's own words first; then which it was, `what_now`, and what there is of the others."""
    console, n_ranks = context.error_console, len(ended.pids)
    console.file.write(failure.errors)
    print_line(console, f"Rank {failure.rank} of {n_ranks} (process {failure.pid}) {failure.how}; {what_now}")
    for rank, text in ended.others.items():
        print_line(console, f"== rank {rank}")
        console.file.write(text)


def _record(ended: Ended, run: RunFolder, experiments: Experiments, context: Context) -> None:
    """Writes how the run ended, which rank 0 may not have known, or not have lived to tell."""
    failure = ended.failure
    status: EndStatus = "interrupted"
    message = "cut off by a signal"
    if failure is not None:
        status = "diverged" if failure.code == ExitCode.DIVERGED else "failed"
        message = _last_words(failure) if failure.rank == 0 else f"rank {failure.rank}: {_last_words(failure)}"
    try:
        with experiments:
            row = recorded(experiments, run)
            if row is not None and row.pid == ended.pids[0]:  # else it ended before it was recorded to have begun
                experiments.finish(run.run_id, status, message)
    except (TrainError, sqlite3.Error, OSError) as error:
        print_line(context.error_console, f"The experiments database could not be written: {error}")


def _last_words(failure: Failure) -> str:
    """The line of what a rank wrote that says why it ended."""
    lines = failure.errors.strip().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [failure.how, *lines[-1:], *errors[-1:]][-1]
