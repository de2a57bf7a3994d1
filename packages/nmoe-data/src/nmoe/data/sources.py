"""Documents out of text, JSONL and Parquet files, one at a time."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nmoe.data.errors import SourceError

TEXT_CUT = 1 << 16
"""Characters after which a text file's document ends at the next blank line."""
TEXT_LIMIT = 1 << 20
"""Characters after which it ends in any case."""

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_PARQUET_ROWS = 1024


class TextFiles:
    """The documents of text (`.txt`, `.md`, `.rst`), JSONL (`.jsonl`, `.jsonl.gz`) and Parquet (`.parquet`) files.

    A line of JSONL or a row of Parquet is a document: the string under `text_key`. A text file is cut at the first
    blank line after each 65,536 characters, so that a single book can be split into training and validation, and so
    that no file needs to fit into memory; together the pieces are the file. Empty documents are skipped. The order is
    that of `paths`; a folder stands for the supported files below it, sorted by path, hidden ones left out.

    Iterating opens the files anew each time and holds a document (of Parquet, a row group) at once. Raises SourceError
    for what is missing or of another kind on construction, and for malformed content, with file and line, on iterating.
    """

    def __init__(self, paths: Sequence[Path], text_key: str = "text") -> None:
        self.text_key = text_key
        self.files = [file for path in paths for file in _expand(Path(path))]
        """The files, in reading order."""

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            try:
                for text in _reader(path)(path, self.text_key):
                    if text:
                        yield text
            except OSError as error:
                raise SourceError(
                    str(path),
                    expected="a file that can be read",
                    found=str(error),
                    remedy="Check the path, its rights and the disk.",
                ) from error

    def describe(self) -> dict[str, Any]:
        """What a manifest keeps of the source: the files' number, size in bytes and first few names."""
        names = [path.name for path in self.files[:16]]
        size = sum(path.stat().st_size for path in self.files)
        return {"kind": "files", "files": len(self.files), "bytes": size, "first": names, "text_key": self.text_key}


def _read_text(path: Path, key: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending, position = "", 0
    with open(path, "rb") as handle:
        while True:
            chunk = handle.read(TEXT_CUT)
            held = len(decoder.getstate()[0])
            try:
                decoded = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise SourceError(
                    str(path),
                    expected="UTF-8 text",
                    found=f"byte {error.object[error.start]:#04x} at position {position - held + error.start}",
                    remedy="Convert the file to UTF-8.",
                ) from error
            pending += decoded.removeprefix("\ufeff") if position == 0 else decoded
            position += len(chunk)
            while (end := _document_end(pending)) is not None:
                yield pending[:end]
                pending = pending[end:]
            if not chunk:
                break
    yield pending


def _document_end(text: str) -> int | None:
    border = _BLANK_LINES.search(text, TEXT_CUT)
    # Blank lines that reach the end may go on in the next chunk.
    if border is not None and border.end() < len(text):
        return border.end()
    return TEXT_LIMIT if len(text) > TEXT_LIMIT else None


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
        try:
            for number, line in enumerate(handle, 1):
                if not line.isspace():
                    yield _json_text(line, f"{path}:{number}", key)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(
                f"{path}:{number + 1}",
                expected="a whole gzip file",
                found=str(error),
                remedy="Fetch the file again; it is truncated or altered.",
            ) from error


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


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    wanted = f"a Parquet file with a string column {key!r}"
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if key not in schema.names:
                names = ", ".join(repr(name) for name in schema.names[:8])
                raise SourceError(
                    str(path), expected=wanted, found=f"the columns {names}", remedy="Name the column of the text."
                )
            kind = schema.field(key).type
            if types.is_dictionary(kind):
                kind = kind.value_type
            if not any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view)):
                raise SourceError(
                    str(path), expected=wanted, found=f"{key!r} of type {kind}", remedy="Name the column of the text."
                )
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[key]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise SourceError(
                            f"{path}, row {row}", expected="text", found="null", remedy="Drop such rows first."
                        )
                    yield text
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"{path}, row {row}", expected=wanted, found=str(error), remedy="Fetch or write the file again."
        ) from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    suffix = _suffix(path)
    assert suffix is not None, "files of other kinds are refused on construction"
    return _READERS[suffix]


def _expand(path: Path) -> list[Path]:
    kinds = ", ".join(_READERS)
    if path.is_dir():
        below = (file.relative_to(path) for file in path.rglob("*") if _suffix(file) is not None and file.is_file())
        files = sorted(file for file in below if not any(part.startswith(".") for part in file.parts))
        if not files:
            raise SourceError(
                str(path), expected=f"files below it ({kinds})", found="none", remedy="Give another path."
            )
        return [path / file for file in files]
    if not path.exists():
        raise SourceError(str(path), expected="a file or a folder", found="nothing", remedy="Check the path.")
    if _suffix(path) is None:
        raise SourceError(
            str(path), expected=f"one of {kinds}", found=repr(path.name), remedy="Convert the file or rename it."
        )
    return [path]
