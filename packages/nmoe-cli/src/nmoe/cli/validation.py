"""Every mistake in a merged configuration, in words, with the place where it was written."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from nmoe.cli.errors import ConfigError, Problem
from nmoe.cli.layers import Layer, Origin, dotted
from nmoe.cli.schema_index import SchemaIndex, nearest
from nmoe.cli.toml_positions import KeyPath
from nmoe.cli.toml_writer import toml_value
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Config = TypeVar("Config", bound=BaseModel)


def validate(
    model: type[Config],
    layer: Layer,
    known_problems: Sequence[Problem] = (),
    value_problems: Mapping[KeyPath, Sequence[str]] | None = None,
) -> Config:
    """The configuration that `layer` holds.

    Types are strict: a quoted number is no number, and 100.0 is no integer. A misspelt name is read as the nearest
    one when looking for further mistakes, so that one run shows them all.

    Args:
        model: schema of the whole file.
        layer: all files and flags, merged.
        known_problems: mistakes outside any key, to be raised with the others.
        value_problems: mistakes that were found in the values of keys before.

    Raises:
        ConfigError: all mistakes.
    """
    search = _Search(model, layer)
    for path, messages in (value_problems or {}).items():
        for message in messages:
            search.add(path, message)
    values = search.table(layer.values, ())
    # By way of JSON, whose strict mode has just TOML's types: paths are strings and tuples are arrays there.
    try:
        config = model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            search.schema_error(detail)
    else:
        if not search.found and not known_problems:
            return config
    search.found.sort(key=lambda item: layer.order(item[0]))
    raise ConfigError([*(problem for _, problem in search.found), *known_problems])


class _Search(Generic[Config]):
    """Collects problems; every message says what was found and what is allowed."""

    def __init__(self, model: type[Config], layer: Layer) -> None:
        self.schema = SchemaIndex(model)
        self.layer = layer
        self.found: list[tuple[Origin, Problem]] = []
        self.paths: set[KeyPath] = set()
        self.spelled: dict[KeyPath, KeyPath] = {}
        """Path as the schema has it -> path as the user wrote it, where the two differ."""

    def add(self, path: KeyPath, message: str, written: KeyPath | None = None) -> None:
        self.paths.add(path)
        written = written or path
        origin = self.layer.origin(written)
        self.found.append((origin, Problem(str(origin), dotted(written), message)))

    # Names and values that JSON cannot carry

    def table(self, values: Mapping[str, Any], path: KeyPath, written: KeyPath = ()) -> dict[str, Any]:
        """`values` as JSON takes them, under the schema's names; unknown names are reported."""
        table = self.schema.table(path)
        result: dict[str, Any] = {}
        for key, value in values.items():
            name: str | None = key
            if table is not None and key not in table.model_fields:
                name = self.unknown(key, value, [*table.model_fields], (*written, key))
                if name is None or name in values or name in result:
                    continue
                self.spelled[(*path, name)] = (*written, key)
            assert name is not None
            result[name] = self.value(value, (*path, name), (*written, key))
        return result

    def value(self, value: Any, path: KeyPath, written: KeyPath) -> Any:
        match value:
            case dict():
                return self.table(value, path, written)
            case list():
                return [self.value(item, (*path, place), (*written, place)) for place, item in enumerate(value)]
            case float() if not math.isfinite(value):
                self.add(path, f"expected a finite number, found {value}", written)
                return None
            case None | bool() | int() | float() | str():
                return value
        self.add(path, f"expected {self.schema.allowed(path)}, found the date or time {value}", written)
        return None

    def unknown(self, key: str, value: Any, valid: Sequence[str], written: KeyPath) -> str | None:
        """Reports an unknown name; returns the one to read it as, if one is near."""
        section = dotted(written[:-1])
        is_section = not section and isinstance(value, dict)
        kind = f"unknown section [{key}]" if is_section else "unknown key" if section else "a key outside any section"
        # The very name in another place is what was meant, more often than a name like it here.
        meant = [home for home in self.schema.homes(key) if home.rpartition(".")[0] != section]
        near = nearest(key, valid) if not meant and (section or is_section) else []
        meant = meant or [dotted((*written[:-1], name)) for name in near]
        if meant:
            hint = f"; did you mean {_listed([f'[{name}]' if is_section else name for name in meant], 'or')}?"
        else:
            hint = f": the {f'keys of [{section}]' if section else 'sections'} are {_listed(valid)}"
        self.add(written, kind + hint)
        return near[0] if len(near) == 1 else None

    # What pydantic found

    def schema_error(self, detail: ErrorDetails) -> None:
        path: KeyPath = detail["loc"]
        written = self.as_written(path)
        if any(path[: len(known)] == known for known in self.paths if known):
            return  # its value has been refused already, for a reason nearer to the cause
        match detail["type"]:
            case "missing":
                self.missing(path, written)
            case "value_error" if isinstance(detail["input"], dict):
                # A validator over a whole table, which joins what it found by semicolons.
                for message in str(detail["ctx"]["error"]).split("; "):
                    self.disagreement(path, written, message)
            case "value_error":
                self.add(path, str(detail["ctx"]["error"]), written)
            case _:
                self.wrong_value(path, written, detail["input"])

    def as_written(self, path: KeyPath) -> KeyPath:
        for length in range(len(path), 0, -1):
            if path[:length] in self.spelled:
                return self.spelled[path[:length]] + path[length:]
        return path

    def missing(self, path: KeyPath, written: KeyPath) -> None:
        if self.schema.table(path) is not None:
            keys = _listed(self.schema.required(path))
            kind = "section" if len(path) == 1 else "table"
            self.add(path, f"this {kind} is missing; it needs {keys}", written)
        else:
            self.add(path, f"this key is missing; it takes {self.schema.allowed(path)}", written)

    def wrong_value(self, path: KeyPath, written: KeyPath, value: Any) -> None:
        if isinstance(value, dict):
            found = "a table"
        else:
            found = toml_value(value)
        if isinstance(value, str) and self.schema.allowed(path).startswith(("an integer", "a number", "true")):
            found += " (a string)"
        self.add(path, f"expected {self.schema.allowed(path)}, found {found}", written)

    def disagreement(self, path: KeyPath, written: KeyPath, message: str) -> None:
        """Keys that do not go together: it has no line of its own, so say where each of the keys was written."""
        places = {name: place for name, place in self.mentioned(path, message)}
        origin = self.layer.origin(written) if written else Origin(self.layer.main_file)
        named = ", ".join(f"{name} at {place}" for name, place in places.items())
        section = f"[{dotted(written)}]" if written else ""
        self.found.append((origin, Problem(str(origin), section, f"{message} ({named})" if named else message)))

    def mentioned(self, path: KeyPath, message: str) -> Iterator[tuple[str, Origin]]:
        """Keys, relative to the table at `path`, that a message names and that were written somewhere."""
        for word in re.findall(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)*", message):
            target = self.as_written((*path, *word.split(".")))
            if target in self.layer.origins and self.schema.table((*path, *word.split("."))) is None:
                yield word, self.layer.origins[target]


def _listed(names: Sequence[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
