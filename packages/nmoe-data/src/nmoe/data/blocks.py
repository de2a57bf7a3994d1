"""Blocks: a megabyte or so of a source, cheap to cut and to send; its documents are made where they are tokenized."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nmoe.data.errors import SourceError

BLOCK_BYTES = 1 << 20
"""Size at which a block is closed; a single document that is larger makes it larger."""

Position = dict[str, Any]
"""Where in a source the next document begins: JSON values that the source alone understands."""


class Block(ABC):
    """Consecutive documents of a source, not yet taken apart. Can be pickled."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents in order, empty ones left out. Raises SourceError with file and line."""


@dataclass(frozen=True)
class Cut:
    """A block and where it was cut."""

    block: Block
    after: Position
    """Where the source goes on."""
    read: int
    """Bytes of the source that are read by then, as they lie on disk."""


@dataclass(frozen=True)
class TextBlock(Block):
    """Documents as they are."""

    texts: list[str]

    def documents(self) -> Iterator[str]:
        """The texts."""
        return (text for text in self.texts if text)


@dataclass(frozen=True)
class JsonlBlock(Block):
    """Whole lines of a JSONL file."""

    file: str
    first_line: int
    data: bytes
    text_key: str

    def documents(self) -> Iterator[str]:
        """The string under the key, of each line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line and not line.isspace():
                text = _json_text(line, f"{self.file}:{number}", self.text_key)
                if text:
                    yield text


@dataclass(frozen=True)
class RowsBlock(Block):
    """Rows of a Parquet file's text column, as an Arrow stream of one large string column."""

    file: str
    first_row: int
    data: bytes

    def documents(self) -> Iterator[str]:
        """The column's strings."""
        import pyarrow

        with pyarrow.ipc.open_stream(self.data) as stream:
            column = stream.read_all().column(0)
        try:
            rows = column.to_pylist()
        except UnicodeDecodeError as error:
            number = self.first_row + _first_no_text(column)
            found, remedy = f"bytes that are no UTF-8 ({error})", "Mend or drop such rows first."
            raise SourceError(f"{self.file}, row {number}", expected="text", found=found, remedy=remedy) from error
        for number, text in enumerate(rows, self.first_row):
            if text is None:
                raise SourceError(
                    f"{self.file}, row {number}", expected="text", found="null", remedy="Drop such rows first."
                )
            if text:
                yield text


def _first_no_text(column: Any) -> int:
    """The number of the first string that is no UTF-8; there is one."""
    for number, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return number
    raise AssertionError("each string is UTF-8")


def _json_text(line: bytes, where: str, key: str) -> str:
    wanted = f"a JSON object with a string under {key!r}"
    remedy = "Mend the line, or name the key that holds the text."
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(where, expected=wanted, found=f"no JSON: {error}", remedy=remedy) from error
    if not isinstance(record, dict):
        raise SourceError(where, expected=wanted, found=f"a {type(record).__name__}", remedy=remedy)
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        raise SourceError(where, expected=wanted, found=f"an object with the keys {keys}", remedy=remedy)
    text = record[key]
    if not isinstance(text, str):
        raise SourceError(where, expected=wanted, found=f"a {type(text).__name__} there", remedy=remedy)
    return text
