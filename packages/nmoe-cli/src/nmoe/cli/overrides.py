"""`--set section.key=value`: one key of the configuration from the command line."""

import re
import tomllib
from typing import Any

from nmoe.cli.errors import Problem
from nmoe.cli.layers import Layer, Origin
from nmoe.cli.toml_positions import KeyPath

_KEY = re.compile(r"\s*[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\s*")
_LOOKS_LIKE_TOML = ("[", "{", '"', "'")


def parse_set(flag: str) -> Layer | Problem:
    """The layer that `--set` with the argument `flag` stands for, or what is wrong with it.

    The value is TOML; a bare word that is none becomes a string.
    """
    where = f"--set {flag}"
    key, equals, text = flag.partition("=")
    if not equals or not _KEY.fullmatch(key):
        return Problem(where, "", "expected --set section.key=value, such as --set train.steps=100")
    if not text.strip():
        return Problem(where, key.strip(), 'no value after "=": for an empty string write \'""\'')
    value = _value(text.strip())
    if value is None:
        return Problem(where, key.strip(), f"expected a TOML value, found {text.strip()}: a bracket or quote is open")
    path = tuple(key.strip().split("."))
    if path[0] == "base":
        return Problem(where, "base", 'a base belongs in a configuration file, at its top: base = "other.toml"')
    values: dict[str, Any] = {path[-1]: value}
    for part in reversed(path[:-1]):
        values = {part: values}
    origins: dict[KeyPath, Origin] = {path[: length + 1]: Origin(where) for length in range(len(path))}
    return Layer(values, origins, [where])


def _value(text: str) -> Any:
    """The value that `text` stands for; None where it begins as TOML and is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return None if text.startswith(_LOOKS_LIKE_TOML) else text
    value = parsed["value"]
    # More than one key: a line break in the text. Dates: no key takes one, so 2026-01-31 is the name of something.
    if len(parsed) > 1 or not isinstance(value, bool | int | float | str | list | dict):
        return text
    return value
