"""Items of scored tasks: named texts and numbers, and where they stand, so that what is wrong can be named."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmoe.eval.errors import TaskDataError


class Item:
    """One object of a task's data, and where it stands there. Its getters raise TaskDataError."""

    def __init__(self, path: Path | str, line: int, fields: dict[str, Any]) -> None:
        self.path, self.line, self.fields = path, line, fields

    def error(self, problem: str) -> TaskDataError:
        """That this object is wrong."""
        return TaskDataError(self.path, self.line, problem)

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            raise self.error(f"expected a field {key!r}, found {', '.join(map(repr, self.fields)) or 'none'}")
        return self.fields[key]

    def text(self, key: str, *, empty: bool = True) -> str:
        """Text; of white space alone only if `empty`."""
        return self._checked(key, self[key], empty)

    def texts(self, key: str, *, least: int = 2, empty: bool = False) -> list[str]:
        """A list of at least so many texts."""
        values = self[key]
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < least:
            raise self.error(f"expected at least {least} texts under {key!r}, found {values!r}")
        return [self._checked(f"{key}[{number}]", value, empty) for number, value in enumerate(values)]

    def index(self, key: str, count: int) -> int:
        """A whole number from 0 to `count - 1`."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise self.error(f"expected a whole number from 0 to {count - 1} under {key!r}, found {value!r}")
        return value

    def _checked(self, key: str, value: Any, empty: bool) -> str:
        if not isinstance(value, str):
            raise self.error(f"expected text under {key!r}, found {value!r}")
        if not empty and not value.strip():
            raise self.error(f"expected text under {key!r}, found an empty one: {value!r}")
        return value


def read_jsonl(path: Path) -> tuple[list[Item], str]:
    """The file's objects, one a line, and the SHA-256 of its bytes, unpacked where its name ends with `.gz`.

    Raises:
        TaskDataError: a line is no JSON object, or there are none, or the file is not packed as its name says.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise TaskDataError(path, None, f"expected a whole gzip file, found: {error}") from error
    items = []
    # At line feeds alone: other line separators may stand in a text.
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:  # of JSON, or of UTF-8
            raise TaskDataError(path, number, f"expected a JSON object, found what does not parse: {error}") from error
        if not isinstance(value, dict):
            raise TaskDataError(path, number, f"expected a JSON object, found {str(value)[:80]!r}")
        items.append(Item(path, number, value))
    return items, hashlib.sha256(data).hexdigest()
