"""TOML text of a resolved configuration: tomllib reads, this writes."""

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dump_toml(resolved: Mapping[str, Any]) -> str:
    """TOML text of nested tables whose leaves are strings, integers, floats, booleans, paths or lists of those.

    Reading the text back gives equal values. A table's own keys come before its sub-tables, both in their order.

    Raises:
        TypeError: a value of another kind; unset is absent here, so None is one.
    """
    lines: list[str] = []
    _table(resolved, (), lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def toml_value(value: object) -> str:
    """A value as TOML writes it on one line.

    Raises:
        TypeError: TOML has no such value.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str() | PurePath():
            return _string(str(value))
        case list() | tuple():
            return f"[{', '.join(toml_value(item) for item in value)}]"
        case Mapping():
            return f"{{{', '.join(f'{toml_key(key)} = {toml_value(item)}' for key, item in value.items())}}}"
        case _:
            raise TypeError(f"expected a value that TOML can hold, found {value!r}: leave what is unset out")


def toml_key(key: str) -> str:
    """A key, quoted where TOML needs it."""
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which only TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    if path and (values or not table):
        lines += ["", f"[{'.'.join(map(toml_key, path))}]"]
    lines += [f"{toml_key(key)} = {toml_value(value)}" for key, value in values.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _table(value, (*path, key), lines)
