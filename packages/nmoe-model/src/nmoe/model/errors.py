"""Errors of nmoe-model."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path


class ModelError(Exception):
    """Base of every error that nmoe-model raises on purpose."""


class CheckpointError(ModelError):
    """A tensor folder cannot be written or read."""


class IncompleteCheckpointError(CheckpointError):
    """The folder is missing or has no manifest: its writing never ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = "a folder without it: its writing never ended" if path.is_dir() else "no such folder"
        super().__init__(
            f"{path}: expected a complete tensor folder, which has a manifest.json; found {found}. "
            "Check the path, or take another checkpoint"
        )


class CorruptCheckpointError(CheckpointError):
    """A file of the folder is not what was written: missing, cut short or altered."""

    def __init__(self, path: Path, file: str, problem: str) -> None:
        self.path = path
        self.file = file
        super().__init__(f"{path / file}: {problem}. Nothing of this folder is used: take another copy or checkpoint")


class CheckpointVersionError(CheckpointError):
    """The folder's format is of a version that this nmoe-model cannot read."""

    def __init__(self, path: Path, found: str, supported: str, tool: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: expected the format {supported!r}, found {found!r}, written by {tool}. Read it with that version"
        )


class MissingEntryError(CheckpointError):
    """The folder holds no tensor or document of that name."""

    def __init__(self, path: Path, kind: str, name: str, known: Iterable[str]) -> None:
        self.path = path
        self.name = name
        known = list(known)
        near = get_close_matches(name, known, n=1)
        hint = f"the nearest name is {near[0]!r}" if near else "none has a similar name"
        super().__init__(f"{path}: expected a {kind} {name!r}, found {len(known)} others; {hint}")


class InvalidEntryError(CheckpointError):
    """A tensor or document that the folder's format cannot hold."""


class FolderExistsError(CheckpointError):
    """Something is already at the place to write to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path}: expected nothing there, found an existing entry. Remove it, or choose another path")


class DiskSpaceError(CheckpointError):
    """The disk has no room for the folder."""

    def __init__(self, path: Path, need: int, free: int) -> None:
        self.path = path
        self.need = need
        self.free = free
        super().__init__(
            f"{path}: expected {need / 1e9:.3f} GB of free disk space for it, found {free / 1e9:.3f} GB. "
            "Free some space, or write to another disk"
        )


class UnsupportedByFormatError(ModelError):
    """The model has a part that Hugging Face's DeepSeek-V3 format has no word for."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.keys = tuple(problems)
        """The keys of `[model]` (or `dtype`) that stand in the way."""
        found = "; ".join(f"{key} {problem}" for key, problem in problems.items())
        super().__init__(
            f"expected a model that Hugging Face's DeepSeek-V3 format can express; found {found}. "
            "Such a model can only be used in nmoe's own checkpoint format"
        )


class TensorMismatchError(ModelError):
    """The given tensors are not those of the given config."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        """One for each tensor."""
        super().__init__(
            f"expected exactly the tensors of the config; found {_shortened(self.problems)}. "
            "Pass the config that the tensors were made with"
        )


class ForeignModelError(ModelError):
    """A Hugging Face folder holds no model that nmoe computes exactly."""

    def __init__(self, path: Path, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        """All that was found, one for each key, tensor or file."""
        super().__init__(
            f"{path}: expected a Hugging Face folder of a DeepSeek-V3 model that nmoe computes exactly; "
            f"found {_shortened(self.problems)}. Take another export of the model, or another model"
        )


def _shortened(problems: tuple[str, ...], most: int = 12) -> str:
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


class WeightsMismatchError(ModelError):
    """A folder's tensors are not those of this model."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        super().__init__(
            f"{path}: expected the weights of this model's shape, found:\n{shown}{more}\n"
            "Give the [model] section that these weights were made with"
        )


class SamplingError(ModelError):
    """Text cannot be generated as was asked: sampling settings or the prompt are out of range."""
