"""The files and flags that a configuration is made of, each value with its origin."""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nmoe.cli.errors import ConfigError, Problem
from nmoe.cli.placeholders import expand
from nmoe.cli.toml_positions import KeyPath, key_lines
from nmoe.cli.toml_writer import toml_key

_BASE = "base"


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    source: str
    """A file as the user named it, or `--set key=value`."""
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass
class Layer:
    """Values of one file or one flag, or of several merged."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    """Names of what was merged, the base first."""

    def origin(self, path: KeyPath) -> Origin:
        """Where `path` was written, or else the innermost table around it that was written, or else the last file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return Origin(self.sources[0] if len(self.sources) == 1 else self.main_file)

    @property
    def main_file(self) -> str:
        """The file that the user named: the last that is no flag."""
        return next((source for source in reversed(self.sources) if not source.startswith("--set ")), "")

    def order(self, origin: Origin) -> tuple[int, int]:
        """Sorts origins: by file, the base first, then by line; flags last."""
        place = self.sources.index(origin.source) if origin.source in self.sources else len(self.sources)
        return place, origin.line or 0


def read_files(path: Path, environ: Mapping[str, str]) -> tuple[list[Layer], list[Path]]:
    """The file at `path` and those that it inherits by `base`, the innermost base first; and their paths.

    Raises:
        ConfigError: a file is missing, is no TOML, or inherits itself.
    """
    layers: list[Layer] = []
    paths: list[Path] = []
    seen: list[Path] = []
    origin: Origin | None = None
    while True:
        if path.resolve() in seen:
            chain = " → ".join(map(str, [*paths, path]))
            raise ConfigError([Problem(str(origin), _BASE, f"expected a chain of files that ends, found {chain}")])
        seen.append(path.resolve())
        paths.append(path)
        layer = _read_file(path, origin)
        layers.append(layer)
        if _BASE not in layer.values:
            return layers[::-1], paths[::-1]
        base, origin = layer.values.pop(_BASE), layer.origins.pop((_BASE,))
        if not isinstance(base, str) or not base:
            raise ConfigError([Problem(str(origin), _BASE, f"expected the path of a TOML file, found {base!r}")])
        expanded, problems = expand(base, environ)
        if problems:
            raise ConfigError([Problem(str(origin), _BASE, problem) for problem in problems])
        path = Path(os.path.normpath(path.parent / expanded))


def _read_file(path: Path, asked_by: Origin | None) -> Layer:
    where, key = (str(asked_by), _BASE) if asked_by else ("", "")
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        message = f"expected a TOML file, found nothing at {path}{_neighbours(path)}"
        raise ConfigError([Problem(where, key, message)]) from None
    except OSError as error:
        raise ConfigError([Problem(where, key, f"cannot read {path}: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        message = f"expected UTF-8, found the byte 0x{error.object[error.start]:02x}: save the file as UTF-8"
        raise ConfigError([Problem(f"{path}:{line}", "", message)]) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(path, text, str(error))]) from None
    name = str(path)
    origins = {keys: Origin(name, line) for keys, line in key_lines(text).items()}
    return Layer(values, origins, [name])


def _neighbours(path: Path) -> str:
    """A hint at what may have been meant instead of a file that is not there."""
    try:
        names = sorted(other.name for other in path.parent.iterdir() if other.suffix == ".toml")
    except OSError:
        return f" (nor the folder {path.parent})"
    close = get_close_matches(path.name, names, n=1) or get_close_matches(f"{path.name}.toml", names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _syntax_problem(path: Path, text: str, message: str) -> Problem:
    """tomllib's complaint, with its place moved from the words to the front."""
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    if place is None:
        return Problem(str(path), "", f"no valid TOML: {message}")
    line = int(place[1] or text.rstrip("\n").count("\n") + 1)
    column = int(place[2] or len(text.splitlines()[line - 1]) + 1 if text else 1)
    written = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else ""
    found = f" in {written!r}" if written else ""
    hint = ""
    if message.startswith("Invalid value") and re.search(r"=\s*[A-Za-z]", written):
        hint = ' (text needs quotes: key = "text")'
    elif message.startswith(("Cannot overwrite", "Cannot declare")):
        hint = " (a key or section can be written once)"
    return Problem(f"{path}:{line}:{column}", "", f"no valid TOML: {message[: place.start()]}{found}{hint}")


def expand_layer(layer: Layer, environ: Mapping[str, str]) -> tuple[Layer, dict[KeyPath, list[str]]]:
    """The layer with placeholders in its strings replaced, and by key what is wrong with those that could not be."""
    problems: dict[KeyPath, list[str]] = {}

    def walk(value: Any, path: KeyPath) -> Any:
        match value:
            case str():
                value, found = expand(value, environ)
                if found:
                    problems[path] = found
                return value
            case dict():
                return {key: walk(item, (*path, key)) for key, item in value.items()}
            case list():
                return [walk(item, (*path, place)) for place, item in enumerate(value)]
        return value

    return Layer(walk(layer.values, ()), layer.origins, layer.sources), problems


def merge(layers: Iterable[Layer]) -> Layer:
    """One layer of all: later ones win, tables are merged key by key, any other value is replaced whole."""
    merged = Layer()
    for layer in layers:
        merged.sources += [source for source in layer.sources if source not in merged.sources]
        _merge_table(merged, layer, merged.values, layer.values, ())
    return merged


def _merge_table(merged: Layer, layer: Layer, target: dict[str, Any], source: dict[str, Any], path: KeyPath) -> None:
    for key, value in source.items():
        here: KeyPath = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            # A table's place is the header that a person finds in a file; a flag sets single keys in it.
            if here in layer.origins and layer.origins[here].line is not None:
                merged.origins[here] = layer.origins[here]
            _merge_table(merged, layer, target[key], value, here)
            continue
        for stale in [known for known in merged.origins if known[: len(here)] == here]:
            del merged.origins[stale]
        merged.origins |= {known: place for known, place in layer.origins.items() if known[: len(here)] == here}
        target[key] = _copy(value)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value


def dotted(path: Sequence[str | int]) -> str:
    """A path as a user writes it: `model.yarn.factor`, `eval.tasks[0]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{toml_key(key)}"
    return text.removeprefix(".")
