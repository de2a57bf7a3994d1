"""Finds the model that a command line names: a run, a run at a step, or a folder."""

from dataclasses import dataclass
from pathlib import Path

from nmoe.cli.errors import UnknownModelError, UsageError
from nmoe.model.checkpoint import is_complete
from nmoe.train.checkpointer import list_complete, newest_complete, step_of
from nmoe.train.run_folder import RunFolder


@dataclass(frozen=True)
class Located:
    """A model on disk."""

    folder: Path
    """Its tensor folder."""
    run: RunFolder | None
    """The run that it is a checkpoint of; None for a model that was imported."""
    step: int | None


def locate_model(name: str, data_root: Path) -> Located:
    """The model that `name` stands for.

    Args:
        name: a run's id, its newest complete checkpoint; `RUN@STEP`, that checkpoint; the path of a run's folder, or of
            a tensor folder (a checkpoint, or what `n import` made).
        data_root: holds `runs/`.

    Raises:
        UnknownModelError: there is no such run, or it has no complete checkpoint.
        UsageError: the step is no number.
    """
    path = Path(name)
    if is_complete(path):
        return _tensor_folder(path)
    run_id, step = _split(name)
    run = _run_at(Path(run_id))
    if run is None and len(Path(run_id).parts) > 1:
        found = "neither" if Path(run_id).exists() else "nothing there"
        raise UnknownModelError(f"{run_id}: expected a run's folder or a complete tensor folder, found {found}")
    if run is None:
        run = RunFolder(data_root, run_id)
    run.open()
    if not step:
        newest = newest_complete(run.checkpoints)
        if newest is None:
            raise UnknownModelError(
                f"run {run.run_id}: expected a complete checkpoint, found none in {run.checkpoints}"
            )
        return Located(newest, run, step_of(newest))
    if not step.isdecimal():
        raise UsageError(f"expected RUN@STEP with a number for the step, found {step!r}")
    steps = {step_of(folder): folder for folder in list_complete(run.checkpoints)}
    if int(step) not in steps:
        raise UnknownModelError(
            f"run {run.run_id}: expected a complete checkpoint of step {int(step)}; "
            f"found steps {', '.join(map(str, steps)) or 'none'}"
        )
    return Located(steps[int(step)], run, int(step))


def _split(name: str) -> tuple[str, str]:
    """`RUN@STEP` as its two parts; the step is empty if none is named."""
    run_id, at, step = name.rpartition("@")
    # The folders above a run may have an @ of their own.
    return (run_id, step) if at and "/" not in step else (name, "")


def _tensor_folder(path: Path) -> Located:
    for spelled in _spellings(path):
        if spelled.parent.name == "checkpoints":
            run = _run_at(spelled.parent.parent)
            if run is not None and spelled in (
                run.checkpoints / found.name for found in list_complete(run.checkpoints)
            ):
                return Located(path, run, step_of(spelled))
    return Located(path, None, None)


def _run_at(path: Path) -> RunFolder | None:
    for spelled in _spellings(path):
        if spelled.parent.name == "runs" and (spelled / "config.toml").is_file():
            return RunFolder(spelled.parent.parent, spelled.name)
    return None


def _spellings(path: Path) -> tuple[Path, Path, Path]:
    """A path as given, so that what is printed is what was typed; from the root, as `.` says nothing of where it is;
    and without symbolic links, as one may lead to a run."""
    return path, path.absolute(), path.resolve()
