"""The configuration of a run: TOML files, flags and placeholders in, one frozen object out. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.cli.errors import Problem
from nmoe.cli.layers import expand_layer, merge, read_files
from nmoe.cli.overrides import parse_set
from nmoe.cli.validation import validate
from nmoe.data.schema import DataConfig
from nmoe.eval.schema import EvalConfig
from nmoe.train.schema import TrainingConfig


class RunConfig(TrainingConfig):
    """Every section of a run's configuration."""

    data: DataConfig
    eval: EvalConfig = EvalConfig()


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and what it was made of."""

    config: RunConfig
    resolved: dict[str, Any]
    """Every set key with its final value, defaults included, as `dump_toml` takes it: what a run saves."""
    sources: tuple[Path, ...]
    """The files that were read, the innermost base first."""
    sets: tuple[str, ...]
    """The `--set` arguments, in their order."""


def load_config(path: Path, sets: Sequence[str] = (), *, environ: Mapping[str, str]) -> LoadedConfig:
    """Reads the file at `path` with its bases, applies `sets`, and checks the whole.

    Args:
        path: a TOML file. `base = "other.toml"`, relative to it, inherits another: tables merge key by key.
        sets: `section.key=value` each, the last to have its say.
        environ: variables that `${NMOE_NAME}` and `${NMOE_NAME:-default}` in strings stand for.

    Raises:
        ConfigError: every mistake that could be found, each with file, line and key.
    """
    layers, sources = read_files(path, environ)
    flag_problems: list[Problem] = []
    for flag in sets:
        parsed = parse_set(flag)
        if isinstance(parsed, Problem):
            flag_problems.append(parsed)
        else:
            layers.append(parsed)
    # Placeholders after merging: one that is overridden needs no variable.
    merged, value_problems = expand_layer(merge(layers), environ)
    config = validate(RunConfig, merged, flag_problems, value_problems)
    return LoadedConfig(config, resolve(config), tuple(sources), tuple(sets))


def resolve(config: RunConfig) -> dict[str, Any]:
    """Every set key of `config` as nested tables of TOML's own types."""
    return config.model_dump(mode="json", exclude_none=True)
