"""Where tasks take their data from, and what a name on the command line stands for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nmoe.eval.requests import Task
from nmoe.eval.results import Row, TaskResult


@dataclass(frozen=True)
class Sources:
    """Where data may be."""

    folders: tuple[Path, ...] = ()
    """Looked at in this order."""
    hub: bool = True
    """Whether what no folder holds may come from the Hugging Face hub, or its cache."""
    allow_missing: bool = False
    """Go on without tasks whose data is not there, if the name stands for several."""
    unsafe_exec: bool = False
    """Run generated programs where no sandbox can be had."""

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders, and in each the one of an evaluation bundle."""
        return tuple(place for folder in self.folders for place in (folder, folder / "eval_bundle"))


@dataclass(frozen=True)
class Suite:
    """What a name stands for: tasks, and figures of them together."""

    tasks: tuple[Task, ...]
    summarise: Callable[[Sequence[TaskResult]], list[Row]] | None = None
