"""The `[eval]` section. Imports no torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator

VALIDATION = "validation"
"""The task that scores a run's validation set; the others are `nmoe.eval.registry`'s."""


class EvalConfig(BaseModel):
    """What is measured while a run trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt | None = None
    """Steps between evaluations; absent: only after the last step."""
    tasks: tuple[str, ...] = (VALIDATION,)
    """`validation`: loss and bits per byte, every validation byte scored once; others as `n eval --list` has them.
    Empty: nothing is measured."""
    limit: PositiveInt | None = None
    """Of each task but `validation`, only the first so many examples; absent: all."""
    data: Path | None = None
    """Folder with the tasks' data; absent: the data root, and the Hugging Face hub for what is not there."""
    allow_missing: bool = False
    """Leave out tasks without data where a name stands for several, as `core` does, and say that the score is partial;
    otherwise the run does not begin."""
    max_sequences: PositiveInt | None = None
    """Only the first so many sequences of the validation set, where it is large; absent: all of it."""

    @field_validator("tasks")
    @classmethod
    def _are_known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if others := [name for name in tasks if name != VALIDATION]:
            from nmoe.eval.errors import UnknownTaskError
            from nmoe.eval.registry import check_names

            try:
                check_names(others)
            except UnknownTaskError as error:
                raise ValueError(str(error)) from error
        return tasks

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The tasks but `validation`, each once."""
        return tuple(dict.fromkeys(name for name in self.tasks if name != VALIDATION))
