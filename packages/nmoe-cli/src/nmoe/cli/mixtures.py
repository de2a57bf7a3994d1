"""A mixture as a command meets it: its file with placeholders replaced, its budgets, and where its sources are."""

from collections.abc import Mapping
from pathlib import Path

from nmoe.cli.errors import ConfigError, Problem
from nmoe.cli.placeholders import expand
from nmoe.data.manifest import MANIFEST_NAME, read_manifest
from nmoe.data.mixture import Mixture, MixtureSource, read_mixture


def load_mixture(path: Path, environ: Mapping[str, str]) -> Mixture:
    """Reads a mixture's file.

    Raises:
        MixtureError: it makes no sense.
        ConfigError: a placeholder in it cannot be replaced.
    """

    def expanded(text: str) -> str:
        result, problems = expand(text, environ)
        if problems:
            raise ConfigError([Problem(str(path), "", problem) for problem in problems])
        return result

    return read_mixture(path, expanded)


def source_folder(source: MixtureSource, mixture: Path, flow: str | None, tokenizer: str, root: Path) -> Path:
    """Where a source is prepared: at its own path, or else in a folder of the mixture, the flow and the tokenizer."""
    if source.path is not None:
        return Path(source.path)
    return root / "mixtures" / "-".join(filter(None, (mixture.stem, flow, tokenizer))) / source.name


def training_set(folder: Path) -> Path:
    """The training set in a prepared folder, or the folder itself where it is a set."""
    return folder if (folder / MANIFEST_NAME).exists() or not (folder / "train").is_dir() else folder / "train"


def prepared_tokens(folder: Path) -> int | None:
    """Training tokens in a prepared folder; None if there is none.

    Raises:
        ManifestError, MissingShardSetError: there is something else.
    """
    return read_manifest(training_set(folder)).n_tokens if folder.exists() else None
