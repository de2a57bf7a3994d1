"""Files to blocks: text, JSONL and Parquet."""

import codecs
import re
from collections.abc import Iterator
from typing import Any

from nmoe.data.blocks import BLOCK_BYTES, Cut, JsonlBlock, Position, RowsBlock, TextBlock
from nmoe.data.errors import SourceError
from nmoe.data.files import InputFile, Opened

TEXT_CUT = 1 << 16
"""Characters after which a text file's document ends at the next blank line."""
TEXT_LIMIT = 1 << 20
"""Characters after which it ends in any case."""

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_BLANKS = re.compile(r"[ \t\r]*")
_CHUNK = 1 << 18
_MAX_ROWS = 8192
_BOM = codecs.BOM_UTF8


def read_blocks(file: InputFile, opened: Opened, start: Position, text_key: str) -> Iterator[Cut]:
    """The blocks of one file from `start` on ({}: the beginning); positions and bytes read count within the file."""
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.kind]
    return reader(file, opened, start, text_key)


def _read_jsonl(file: InputFile, opened: Opened, start: Position, key: str) -> Iterator[Cut]:
    offset, line = start.get("offset", 0), start.get("line", 1)
    _go_to(file, opened, offset)
    parts: list[bytes] = []
    size = 0
    while chunk := _read(file, opened, _CHUNK, f":{line}"):
        size += len(chunk)
        parts.append(chunk)
        end = chunk.rfind(b"\n") + 1
        # A line that is longer than a block is gathered until it ends.
        if size < BLOCK_BYTES or not end:
            continue
        parts[-1] = chunk[:end]
        data = b"".join(parts)
        rest = chunk[end:]
        parts, size = [rest] if rest else [], len(rest)
        block = JsonlBlock(file.name, line, data, key)
        offset, line = offset + len(data), line + data.count(b"\n")
        yield Cut(block, {"offset": offset, "line": line}, opened.raw.tell())
    if parts:
        data = b"".join(parts)
        after = {"offset": offset + len(data), "line": line + data.count(b"\n")}
        yield Cut(JsonlBlock(file.name, line, data, key), after, opened.raw.tell())


def _read_text(file: InputFile, opened: Opened, start: Position, key: str) -> Iterator[Cut]:
    offset = start.get("offset", 0)
    _go_to(file, opened, offset)
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending, position, first = "", offset, offset == 0
    texts: list[str] = []
    size = 0
    while True:
        chunk = _read(file, opened, _CHUNK, "")
        held = len(decoder.getstate()[0])
        try:
            decoded = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise SourceError(
                file.name,
                expected="UTF-8 text",
                found=f"byte {error.object[error.start]:#04x} at position {position - held + error.start}",
                remedy="Convert the file to UTF-8.",
            ) from error
        if first and decoded:
            first = False
            if decoded.startswith("\ufeff"):
                decoded = decoded[1:]
                offset += len(_BOM)
        pending += decoded
        position += len(chunk)
        # The last document ends with the file.
        while (end := _document_end(pending, whole=not chunk)) is not None:
            texts.append(pending[:end])
            length = len(texts[-1].encode())
            pending, offset, size = pending[end:], offset + length, size + length
            if size >= BLOCK_BYTES:
                yield Cut(TextBlock(texts), {"offset": offset}, opened.raw.tell())
                texts, size = [], 0
        if not chunk:
            break
    if texts:
        yield Cut(TextBlock(texts), {"offset": offset}, opened.raw.tell())


def _document_end(text: str, *, whole: bool) -> int | None:
    """Where the first document of `text` ends, None if more of the file must be read to tell.

    Depends on the file's characters alone, not on how much of it has been read: reading goes on from any border.
    """
    seen = min(len(text), TEXT_LIMIT + 1)
    border = _BLANK_LINES.search(text, TEXT_CUT, seen)
    # Blank lines that reach the end of what is seen may go on in what follows.
    if border is not None and _BLANKS.match(text, border.end(), seen).end() < seen:  # type: ignore[union-attr]
        return border.end()
    if len(text) > TEXT_LIMIT:
        return TEXT_LIMIT
    return len(text) if whole and text else None


def _read_parquet(file: InputFile, opened: Opened, start: Position, key: str) -> Iterator[Cut]:
    import pyarrow
    import pyarrow.parquet

    first_group, skip, row = start.get("group", 0), start.get("skip", 0), start.get("row", 0)
    remedy = "Fetch or write the file again."
    try:
        # A buffer lets a row group of any size stream through.
        with pyarrow.parquet.ParquetFile(opened.content, buffer_size=BLOCK_BYTES) as parquet:
            _check_column(file.name, parquet.schema_arrow, key)
            metadata = parquet.metadata
            read = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                column_bytes, packed_bytes = _column_sizes(metadata.row_group(group), key)
                if group >= first_group and rows:
                    batch_rows = max(1, min(_MAX_ROWS, BLOCK_BYTES * rows // max(1, column_bytes)))
                    done = 0
                    for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=[group], columns=[key]):
                        fresh = batch.slice(max(0, skip - done)) if done < skip else batch
                        done += batch.num_rows
                        if not fresh.num_rows:
                            continue
                        block = RowsBlock(file.name, row, _as_stream(fresh.column(0)))
                        row += fresh.num_rows
                        after = {"group": group, "skip": done, "row": row}
                        yield Cut(block, after, read + packed_bytes * done // rows)
                    skip = 0
                read += packed_bytes
    except (pyarrow.ArrowException, OSError) as error:
        wanted = f"a Parquet file with a string column {key!r}"
        raise SourceError(f"{file.name}, row {row}", expected=wanted, found=str(error), remedy=remedy) from error


def _check_column(name: str, schema: Any, key: str) -> None:
    from pyarrow import types

    wanted, remedy = f"a Parquet file with a string column {key!r}", "Name the column of the text."
    if key not in schema.names:
        names = ", ".join(repr(column) for column in schema.names[:8])
        raise SourceError(name, expected=wanted, found=f"the columns {names}", remedy=remedy)
    kind = schema.field(key).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view)):
        raise SourceError(name, expected=wanted, found=f"{key!r} of type {kind}", remedy=remedy)


def _column_sizes(group: Any, key: str) -> tuple[int, int]:
    """Bytes of the column, decoded, and of the whole group as it lies on disk."""
    columns = [group.column(number) for number in range(group.num_columns)]
    decoded = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == key)
    return decoded, sum(column.total_compressed_size for column in columns)


def _as_stream(column: Any) -> bytes:
    import pyarrow

    batch = pyarrow.record_batch([column.cast(pyarrow.large_string())], ["text"])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _go_to(file: InputFile, opened: Opened, offset: int) -> None:
    if not opened.packed:
        opened.content.seek(offset)
        return
    while offset:
        passed = len(_read(file, opened, min(offset, _CHUNK), ""))
        if not passed:
            raise SourceError(
                file.name,
                expected=f"at least {offset} more bytes of text",
                found="the end",
                remedy="The file changed: prepare it from the start.",
            )
        offset -= passed


def _read(file: InputFile, opened: Opened, size: int, where: str) -> bytes:
    if not opened.packed:
        return opened.content.read(size)
    try:
        return opened.content.read(size)
    except OSError as error:
        raise SourceError(
            f"{file.name}{where}",
            expected="a whole compressed file",
            found=str(error),
            remedy="Fetch the file again; it is truncated or altered.",
        ) from error
