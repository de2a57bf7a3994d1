"""Errors of nmoe-train."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class TrainError(Exception):
    """Base of every error that nmoe-train raises on purpose."""


class NonFiniteError(TrainError):
    """A loss or gradient was NaN or infinite; the weights are those before that step."""

    def __init__(self, step: int, what: str, where: str) -> None:
        self.step = step
        super().__init__(
            f"step {step}: expected finite numbers, found NaN or infinity in {what}: {where}. The weights are those "
            f"before this step: resume from a checkpoint with a lower learning rate, or look at that data"
        )


class NotReproducibleError(TrainError):
    """Gradients had other bits when they were computed again; the weights are those before that step."""

    def __init__(self, step: int, names: Sequence[str], ranks: Sequence[int]) -> None:
        self.step, self.names, self.ranks = step, tuple(names), tuple(ranks)
        """Names of parameters in a backward's order: the first is next to where it went wrong."""
        shown = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        super().__init__(
            f"step {step}: expected gradients of the same bits each time, found others on rank "
            f"{', '.join(map(str, self.ranks))}, of {shown}. The weights are those before this step. A machine that "
            "computes wrong now and then is likely (of a GPU, nvidia-smi -q counts its memory's errors): resume from a "
            "checkpoint on another one; if it happens there too, report this message and the run's config.toml"
        )


class WorldSizeError(TrainError):
    """The ranks that are there are not those that the configuration divides the batch among."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(
            f"expected runtime.world_size = {expected} ranks, found {found}: start as many, or set runtime.world_size"
        )


class PeerFaultError(TrainError):
    """Other ranks could not exchange rows; the weights are those before that step."""

    def __init__(self, step: int, ranks: Sequence[int]) -> None:
        self.step, self.ranks = step, tuple(ranks)
        super().__init__(
            f"step {step}: expected all ranks to exchange their rows, found a fault on rank "
            f"{', '.join(map(str, self.ranks))}: see what went wrong there"
        )


class IdentityMismatchError(TrainError):
    """A run cannot go on under settings or data that change what it computes."""

    def __init__(self, changed: Sequence[tuple[str, Any, Any]]) -> None:
        self.changed = tuple(changed)
        """Key, old value, new value; `None` where one side has none."""
        lines = [f"  {key}: the run has {old!r}, now {new!r}" for key, old, new in self.changed]
        super().__init__(
            "\n".join(
                [
                    "the checkpoint was made under other settings. Restore them (the run's folder has them, in "
                    "config.toml), or start a new run from it:",
                    *lines,
                ]
            )
        )


class InvalidRunIdError(TrainError):
    """A run's name cannot be a folder's."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"run {run_id!r}: expected a name of letters, digits, '-', '_' and '.' that begins with a letter or digit. "
            "Choose another, or leave it out and one is made"
        )


class RunExistsError(TrainError):
    """A run of that name is already on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path}: expected no run of that name, found one. Resume it, or choose another name")


class UnknownRunError(TrainError):
    """No run has that name."""

    def __init__(self, run_id: str, where: Path, known: Iterable[str]) -> None:
        self.run_id = run_id
        known = list(known)
        near = get_close_matches(run_id, known, n=1)
        hint = f"the nearest name is {near[0]!r}" if near else "`n runs` lists them"
        super().__init__(f"run {run_id!r}: expected one of the {len(known)} runs in {where}, found none; {hint}")


class RunLockedError(TrainError):
    """Another process is writing the run."""

    def __init__(self, path: Path, holder: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: expected no other writer, found {holder}. Stop that process, or start a run of another name"
        )


class ExperimentsVersionError(TrainError):
    """The experiments database was made by a newer nmoe-train."""

    def __init__(self, path: Path, found: int, supported: int) -> None:
        super().__init__(f"{path}: expected at most version {supported}, found {found}. Update nmoe-train")


class DamagedExperimentsError(TrainError):
    """The experiments database cannot be read."""

    def __init__(self, path: Path, reason: Exception) -> None:
        super().__init__(
            f"{path}: expected an SQLite database, found damage ({reason}). Move it away: a new one is begun, and the "
            "runs in their folders can still be continued and used"
        )


class MetricsError(TrainError):
    """The metrics on disk cannot be read."""


class RefusedCheckpointError(TrainError):
    """A checkpoint is torn or altered."""

    def __init__(self, path: Path, reason: Exception, older: Path | None) -> None:
        self.path = path
        self.older = older
        """The newest complete checkpoint before it; `None` if there is none."""
        remedy = (
            f"{older.name} is complete: move {path.name} away to resume from it, or name its step to use it (RUN@STEP)"
            if older is not None
            else "There is no complete older one beside it"
        )
        super().__init__(f"checkpoint {path.name} is refused: {reason}. {remedy}")


class MissingCheckpointsError(TrainError):
    """A run was saved, and nothing of that is there."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        super().__init__(
            f"{folder}: expected a checkpoint of a run that has made {step} steps, found none. Bring the folder "
            "back, or leave out --run-id for a new run"
        )


class CheckpointWriteError(TrainError):
    """A checkpoint could not be written in the background; the ones before it are as they were."""

    def __init__(self, path: Path, reason: Exception) -> None:
        self.path = path
        super().__init__(
            f"{path}: expected to write this checkpoint and remove old ones, found {type(reason).__name__}: {reason}. "
            "Older checkpoints are untouched: mend the disk and resume"
        )
