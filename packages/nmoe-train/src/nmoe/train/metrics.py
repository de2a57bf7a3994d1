"""Metrics of a run: Parquet files of rows (step, tag, value, rank).

    step_XXXXXXXX.parquet              the rows of one step
    steps_XXXXXXXX-XXXXXXXX.parquet    the rows of a range of steps, joined from those in the background

A rank above 0 adds `.rankN` to the names. Files are there whole or not at all. A row may be in two of them, since a
range is written before its parts are removed; it counts once: a step's own file holds the latest value, then the range
that ends last.
"""

import glob
import io
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from nmoe.train.errors import MetricsError
from nmoe.train.files import write_atomically

SCHEMA = pa.schema([("step", pa.int64()), ("tag", pa.string()), ("value", pa.float64()), ("rank", pa.int32())])

_NAME = re.compile(r"steps?_(?P<first>\d{8,})(?:-(?P<last>\d{8,}))?(?:\.rank(?P<rank>\d+))?\.parquet")
_READ_ATTEMPTS = 10
_REMEDY = "Remove that file to go on without its steps"
_RANGES = """
    SELECT step, tag, value, rank, place
    FROM read_parquet($patterns, filename = 'file', hive_partitioning = false)
    JOIN (SELECT unnest($files) AS file, generate_subscripts($files, 1) AS place) USING (file)
"""
_STEPS = "SELECT step, tag, value, rank, 1000000000 AS place FROM steps"
_QUERY = """
    SELECT step, tag, arg_max(value, place) AS value, rank
    FROM ({rows})
    WHERE $tags IS NULL OR tag IN (SELECT unnest($tags))
    GROUP BY step, tag, rank
    ORDER BY tag, step, rank
"""


class MetricsWriter:
    """Writes one rank's metrics. The only writer of that rank's files; for one thread."""

    def __init__(self, folder: Path, rank: int = 0, compact_every: int = 200) -> None:
        """Prepares to write.

        Args:
            folder: Where the files are; made if missing.
            rank: Whose metrics these are.
            compact_every: Steps' files that are joined into one range's file, in the background.
        """
        self.folder = folder
        self._rank = rank
        self._suffix = f".rank{rank}.parquet" if rank else ".parquet"
        self._compact_every = compact_every
        self._thread: threading.Thread | None = None
        self._joining: set[int] = set()
        self._failure: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step*.tmp-*"):
            if _File.parse(leftover.with_name(leftover.name[1:].rpartition(".tmp-")[0]), rank) is not None:
                leftover.unlink()
        self._loose = {file.first: file for file in self._files() if file.is_loose}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records values by tag for a step, synced to the disk.

        A step may be written to again: its rows add up, and of a tag that is given twice the last value counts.

        Raises:
            MetricsError: joining older files failed.
        """
        if step < 0:
            raise ValueError(f"step: expected a number of steps, found {step}")
        rows = pa.table(
            [[step] * len(values), list(values), list(map(float, values.values())), [self._rank] * len(values)],
            schema=SCHEMA,
        )
        if step in self._joining:
            # Its file is about to be removed; what is recorded now goes to a new one.
            self._wait()
        if step in self._loose:
            rows = _latest([_read(self._loose[step].path), rows])
        elif len(self._loose) >= self._compact_every:
            # Only now: the step before may have been written to again until this one began.
            self._compact()
        path = self.folder / f"step_{step:08}{self._suffix}"
        _write(path, rows)
        self._loose[step] = _File(is_loose=True, last=step, first=step, path=path)

    def drop_after(self, step: int) -> None:
        """Removes the rows of all later steps: a run that goes on from `step` writes them anew.

        Raises:
            MetricsError: joining older files failed.
        """
        self._wait()
        for file in self._files():
            if file.last > step:
                if file.first <= step:
                    rows = _read(file.path)
                    self._write_range(file.first, step, rows.filter(pc.less_equal(rows["step"], step)))
                file.path.unlink()
        self._loose = {first: file for first, file in self._loose.items() if first <= step}

    def close(self) -> None:
        """Waits for the background work. The writer may still be used.

        Raises:
            MetricsError: joining older files failed.
        """
        self._wait()

    def _compact(self) -> None:
        self._wait()
        files, self._loose = sorted(self._loose.values()), {}
        self._joining = {file.first for file in files}
        self._thread = threading.Thread(target=self._join_files, args=(files,), name="metrics-compaction")
        self._thread.start()

    def _join_files(self, files: list["_File"]) -> None:
        try:
            self._write_range(files[0].first, files[-1].last, pa.concat_tables(_read(file.path) for file in files))
            # A kill from here on leaves rows in two files, which a reader counts once.
            for file in files:
                file.path.unlink()
        except Exception as error:
            self._failure = error

    def _write_range(self, first: int, last: int, rows: pa.Table) -> None:
        path = self.folder / f"steps_{first:08}-{last:08}{self._suffix}"
        # One of that name is left by a kill, whose parts were partly removed: they are in it alone.
        _write(path, _latest([_read(path), rows]) if path.exists() else rows)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._joining = set()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise MetricsError(f"{self.folder}: expected to join older files, found: {failure}") from failure

    def _files(self) -> list["_File"]:
        return _list_files(self.folder, self._rank)


class NoMetrics:
    """What a rank has that writes no metrics."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records nothing."""

    def drop_after(self, step: int) -> None:
        """There is nothing to remove."""

    def close(self) -> None:
        """There is nothing to wait for."""


def read_metrics(folder: Path, tags: Iterable[str] | None = None) -> pa.Table:
    """All ranks' rows, each (step, tag, rank) once, ordered by tag, step and rank. A run may be writing meanwhile.

    Args:
        folder: A run's metrics folder; a missing one holds no rows.
        tags: The tags to read; absent: all.

    Returns:
        Columns `step` int64, `tag` string, `value` float64, `rank` int32.

    Raises:
        MetricsError: a file is damaged.
    """
    tags = None if tags is None else list(tags)
    for _ in range(_READ_ATTEMPTS):
        # Steps' files first: the rows of one that is gone by now are in a range that is there by now.
        steps = _read_steps(folder)
        ranges = [str(file.path) for file in _list_files(folder) if not file.is_loose]
        try:
            return _query(ranges, steps, tags)
        except duckdb.Error as error:
            if all(map(os.path.exists, ranges)):
                raise MetricsError(f"{folder}: expected Parquet files, found: {error}. {_REMEDY}") from error
            # The run resumed meanwhile, and dropped a range.
    raise MetricsError(f"{folder}: expected files that stay while they are read, found ever new ones. Try again")


@dataclass(frozen=True, order=True)
class _File:
    """A metrics file. Of two files that hold one row, the greater is right."""

    is_loose: bool
    last: int
    first: int
    path: Path

    @staticmethod
    def parse(path: Path, rank: int | None) -> "_File | None":
        """The file at `path`; `None` if its name is none of ours, or another rank's than `rank` (absent: any)."""
        match = _NAME.fullmatch(path.name)
        if match is None or rank not in (None, int(match["rank"] or 0)):
            return None
        return _File(match["last"] is None, int(match["last"] or match["first"]), int(match["first"]), path)


def _list_files(folder: Path, rank: int | None = None) -> list[_File]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for path in paths if (file := _File.parse(path, rank)) is not None)


def _query(ranges: list[str], steps: list[pa.Table], tags: list[str] | None) -> pa.Table:
    rows, parameters = [_STEPS], {"tags": tags}
    if ranges:
        rows.append(_RANGES)
        parameters |= {"files": ranges, "patterns": [glob.escape(file) for file in ranges]}
    with duckdb.connect(":memory:") as connection:
        connection.register("steps", pa.concat_tables([SCHEMA.empty_table(), *steps]))
        query = _QUERY.format(rows=" UNION ALL ".join(rows))
        return connection.sql(query, params=parameters).to_arrow_table().cast(SCHEMA)


def _latest(tables: list[pa.Table]) -> pa.Table:
    """The rows of all tables; of those with equal step, tag and rank, the last."""
    groups = pa.concat_tables(tables).group_by(["step", "tag", "rank"], use_threads=False)
    return groups.aggregate([("value", "last")]).rename_columns({"value_last": "value"}).select(SCHEMA.names)


def _read_steps(folder: Path) -> list[pa.Table]:
    tables = []
    for file in _list_files(folder):
        if file.is_loose:
            with suppress(FileNotFoundError):
                tables.append(_read(file.path))
    return tables


def _read(path: Path) -> pa.Table:
    content = path.read_bytes()
    try:
        return pq.read_table(pa.BufferReader(content), schema=SCHEMA)
    except pa.ArrowInvalid as error:
        raise MetricsError(f"{path}: expected a Parquet file, found: {error}. {_REMEDY}") from error


def _write(path: Path, rows: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    write_atomically(path, buffer.getvalue())
