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
        run = RunFolder(path.parents[3], path.parents[1].name) if _is_checkpoint(path) else None
        return Located(path, run, step_of(path) if run else None)
    run_id, _, step = name.partition("@")
    if Path(run_id).is_dir() and Path(run_id).parent.name == "runs":
        run = RunFolder(Path(run_id).parent.parent, Path(run_id).name)
    elif path.exists() and len(path.parts) > 1:
        raise UnknownModelError(f"{path}: expected a run's folder or a complete tensor folder, found neither")
    else:
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


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.parents[2].name == "runs"
