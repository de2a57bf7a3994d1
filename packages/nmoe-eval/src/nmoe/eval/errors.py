"""Errors of nmoe-eval."""

from pathlib import Path


class EvalError(Exception):
    """Base of every error that nmoe-eval raises on purpose."""


class EmptyValidationError(EvalError):
    """There is nothing to score."""


class RequestError(EvalError):
    """A request that no model could answer, such as an empty continuation."""


class RankError(EvalError):
    """Another rank failed."""


class UnknownTaskError(EvalError):
    """No task has this name."""


class MissingDataError(EvalError):
    """Data of a task is not there; the message lists what is missing and where it was looked for."""


class TaskDataError(EvalError):
    """A task's data is not what it should be.

    Attributes:
        path: the file.
        line: of it, from 1; None where the whole file is meant.
    """

    def __init__(self, path: Path | str, line: int | None, problem: str) -> None:
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {problem}")
        self.path, self.line = path, line


class SandboxUnavailableError(EvalError):
    """Generated programs cannot be contained here.

    Args:
        problem: what was expected, and what was found.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"expected {problem}: install bubblewrap on a machine that allows user namespaces, leave tasks with "
            "programs out, or add --unsafe-exec to run them unconfined"
        )
