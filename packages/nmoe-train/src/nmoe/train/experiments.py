"""The experiments database: one row a run, and one a figure that was measured of a model, in SQLite, written by many
processes."""

import os
import socket
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from nmoe.train.errors import DamagedExperimentsError, ExperimentsVersionError, UnknownRunError

EndStatus = Literal["finished", "interrupted", "failed", "diverged"]
Status = Literal["running", "finished", "interrupted", "failed", "diverged", "killed"]

_VERSION = 3
_BUSY_SECONDS = 30.0
_UNKNOWN = "alive"
"""The mark of a living process whose start cannot be seen: no Linux, or another user's."""
_SCHEMAS = (
    """
CREATE TABLE experiments (
    name TEXT PRIMARY KEY,
    created TEXT NOT NULL
);
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    experiment TEXT NOT NULL REFERENCES experiments (name),
    config TEXT NOT NULL,
    git_commit TEXT,
    parent_run TEXT,
    parent_step INTEGER,
    status TEXT NOT NULL,
    message TEXT,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    process TEXT NOT NULL,
    started TEXT NOT NULL,
    updated TEXT NOT NULL,
    finished TEXT,
    step INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    train_loss REAL,
    val_loss REAL,
    val_bpb REAL
);
CREATE INDEX runs_by_start ON runs (started);
""",
    """
CREATE TABLE evaluations (
    model TEXT NOT NULL,
    step INTEGER,
    task TEXT NOT NULL,
    version TEXT NOT NULL,
    shots INTEGER,
    metric TEXT NOT NULL,
    value REAL,
    stderr REAL,
    centered REAL,
    examples INTEGER NOT NULL,
    example_limit INTEGER,
    data_sha256 TEXT NOT NULL,
    tokenizer TEXT NOT NULL,
    note TEXT NOT NULL,
    measured TEXT NOT NULL
);
CREATE UNIQUE INDEX evaluations_by_key ON evaluations (
    model, ifnull(step, ''), task, version, ifnull(shots, ''), metric, ifnull(example_limit, ''), data_sha256, tokenizer
);
""",
    """
ALTER TABLE runs ADD COLUMN resumed TEXT;
ALTER TABLE runs ADD COLUMN seconds_before REAL NOT NULL DEFAULT 0;
ALTER TABLE evaluations ADD COLUMN max_length INTEGER;
DROP INDEX evaluations_by_key;
CREATE UNIQUE INDEX evaluations_by_key ON evaluations (
    model, ifnull(step, ''), task, version, ifnull(shots, ''), metric, ifnull(example_limit, ''), data_sha256,
    tokenizer, ifnull(max_length, '')
);
""",
)
"""What each version adds to the one before; the first is version 1."""


@dataclass(frozen=True)
class RunRow:
    """What the database knows of one run."""

    run_id: str
    experiment: str
    config: str
    """The resolved configuration, TOML."""
    git_commit: str | None
    parent_run: str | None
    """The run whose weights this one started from."""
    parent_step: int | None
    status: Status
    """`killed`: it was running, and its process is gone without a word."""
    message: str | None
    """Why it ended."""
    host: str
    pid: int
    started: datetime
    updated: datetime
    finished: datetime | None
    seconds: float
    """That it ran, without the time between an end and its going on."""
    step: int
    """Steps done."""
    steps: int
    """Steps planned."""
    train_loss: float | None
    """Last training loss, nats a token."""
    val_loss: float | None
    """Last validation loss, nats a token."""
    val_bpb: float | None
    """Last validation loss, bits a byte."""


@dataclass(frozen=True)
class EvaluationRow:
    """One figure of a task, as it was measured of a model."""

    model: str
    """A run's id, or the folder of an imported model."""
    step: int | None
    """Of the run's checkpoint; None for an imported model."""
    task: str
    version: str
    """Of the task: figures of different versions are not of the same thing."""
    shots: int | None
    """None for figures of several tasks together."""
    metric: str
    value: float | None
    """None where it was not a number."""
    stderr: float | None
    centered: float | None
    examples: int
    """Behind the figure."""
    example_limit: int | None
    """Asked for; None: all."""
    data_sha256: str
    """Of the task's data; empty for figures of several tasks together."""
    tokenizer: str
    """Name and fingerprint."""
    max_length: int | None = None
    """Tokens that the model saw at once; None: recorded before version 3."""
    note: str = ""
    """Such as `partial (14/22)`."""
    measured: datetime | None = None
    """None until it is recorded."""


class Experiments:
    """The runs under one data root. Several processes may use one database; a thread needs its own object."""

    def __init__(self, path: Path) -> None:
        """Names the database. The file is made by the first `start`."""
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def start(
        self,
        run_id: str,
        *,
        experiment: str,
        config: str,
        steps: int,
        step: int = 0,
        git_commit: str | None = None,
        parent_run: str | None = None,
        parent_step: int | None = None,
    ) -> None:
        """Records that this process runs `run_id` from now on. A known run is continued: its start and parent stay.

        Args:
            run_id: The run's name.
            experiment: Name of the group of runs that it belongs to; made if new.
            config: Resolved configuration, TOML.
            steps: Steps planned.
            step: Steps already done.
            git_commit: Commit of the code, if known.
            parent_run: Run whose weights this one starts from, if any.
            parent_step: Step of those weights.
        """
        now = _now()
        values: dict[str, Any] = {
            "run_id": run_id,
            "experiment": experiment,
            "config": config,
            "git_commit": git_commit,
            "parent_run": parent_run,
            "parent_step": parent_step,
            "status": "running",
            "message": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process_mark(os.getpid()),
            "started": now,
            "updated": now,
            "finished": None,
            "step": step,
            "steps": steps,
        }
        connection = self._open()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            values |= {"resumed": now, "seconds_before": 0.0 if known is None else _to_row(known).seconds}
            connection.execute("INSERT OR IGNORE INTO experiments VALUES (?, ?)", (experiment, now))
            renewed = [key for key in values if key not in ("run_id", "started", "parent_run", "parent_step")]
            connection.execute(
                f"INSERT INTO runs ({', '.join(values)}) VALUES ({', '.join(f':{key}' for key in values)}) "
                f"ON CONFLICT (run_id) DO UPDATE SET {', '.join(f'{key} = excluded.{key}' for key in renewed)}",
                values,
            )

    def update(
        self,
        run_id: str,
        *,
        step: int | None = None,
        train_loss: float | None = None,
        val_loss: float | None = None,
        val_bpb: float | None = None,
    ) -> None:
        """Records a run's progress; what is `None` stays as it was. Validation figures may be another process's: they
        are no sign that the run goes on.

        Raises:
            UnknownRunError: the database has no such run.
        """
        values = {"step": step, "train_loss": train_loss, "val_loss": val_loss, "val_bpb": val_bpb}
        changes: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
        if step is not None or train_loss is not None:
            changes["updated"] = _now()
        self._set(run_id, changes)

    def finish(self, run_id: str, status: EndStatus, message: str | None = None) -> None:
        """Records how a run ended.

        Raises:
            UnknownRunError: the database has no such run.
        """
        if status not in get_args(EndStatus):
            raise ValueError(f"status: expected one of {', '.join(get_args(EndStatus))}, found {status!r}")
        now = _now()
        self._set(run_id, {"status": status, "message": message, "finished": now, "updated": now})

    def list(self, limit: int | None = None) -> Sequence[RunRow]:
        """The runs, the latest started first; at most `limit` of them."""
        if not self.path.exists():
            return []
        rows = self._open().execute("SELECT * FROM runs ORDER BY started DESC, run_id DESC LIMIT ?", (limit or -1,))
        return [_to_row(row) for row in rows]

    def get(self, run_id: str) -> RunRow:
        """One run.

        Raises:
            UnknownRunError: the database has no such run; names the nearest.
        """
        if self.path.exists():
            row = self._open().execute("SELECT * FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if row is not None:
                return _to_row(row)
        raise UnknownRunError(run_id, self.path, [row.run_id for row in self.list()])

    def record_evaluation(self, rows: Sequence[EvaluationRow]) -> None:
        """Records figures, all or none. What was measured before of the same model, step, task, version, shots, data,
        limit, tokenizer and length gives way. The model may be one that the database does not know.
        """
        now, names = _now(), [each.name for each in fields(EvaluationRow)]
        values = [{**{name: getattr(row, name) for name in names}, "measured": now} for row in rows]
        connection = self._open()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                f"INSERT OR REPLACE INTO evaluations ({', '.join(names)}) "
                f"VALUES ({', '.join(f':{name}' for name in names)})",
                values,
            )

    def evaluations(self, model: str | None = None, task: str | None = None) -> Sequence[EvaluationRow]:
        """What was measured, in the order of its recording; of one model or one task, where named."""
        if not self.path.exists():
            return []
        found = self._open().execute(
            "SELECT * FROM evaluations WHERE ifnull(model = :model, 1) AND ifnull(task = :task, 1) ORDER BY rowid",
            {"model": model, "task": task},
        )
        rows = [{key: row[key] for key in row.keys()} for row in found]  # noqa: SIM118 - as in `_to_row`
        return [EvaluationRow(**{**row, "measured": datetime.fromisoformat(row["measured"])}) for row in rows]

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _set(self, run_id: str, values: dict[str, Any]) -> None:
        changes = ", ".join(f"{key} = :{key}" for key in values) or "step = step"
        done = self._open().execute(f"UPDATE runs SET {changes} WHERE run_id = :run_id", {**values, "run_id": run_id})
        if done.rowcount == 0:
            self.get(run_id)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _connect(self.path)
        return self._connection


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: every statement outside of an explicit transaction is one of its own.
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        _use_wal(connection)
        # With the write-ahead log this survives the death of the process; a power cut may cost the last updates.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        if _version(connection) < _VERSION:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                # Another process may have been first while this one waited.
                for schema in _SCHEMAS[_version(connection) :]:
                    for statement in filter(str.strip, schema.split(";")):
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {max(_VERSION, _version(connection))}")
        if _version(connection) > _VERSION:
            raise ExperimentsVersionError(path, _version(connection), _VERSION)
    except BaseException as error:
        connection.close()
        if type(error) is sqlite3.DatabaseError:  # its subclasses speak of locks, disks and statements
            raise DamagedExperimentsError(path, error) from error
        raise
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    # SQLite does not wait for its lock when several processes switch the mode at once: so this does.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _to_row(row: sqlite3.Row) -> RunRow:
    values = {key: row[key] for key in row.keys() if key != "process"}  # noqa: SIM118 - a Row iterates over its values
    for key in ("started", "updated", "finished", "resumed"):
        values[key] = datetime.fromisoformat(values[key]) if values[key] is not None else None
    since = values.pop("resumed") or values["started"]  # no `resumed`: of a version before 3
    ran = (values["finished"] or values["updated"]) - since
    values["seconds"] = values.pop("seconds_before") + ran.total_seconds()
    is_here = row["host"] == socket.gethostname()
    if row["status"] == "running" and is_here and _process_mark(row["pid"]) not in (row["process"], _UNKNOWN):
        values["status"] = "killed"
    return RunRow(**values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _process_mark(pid: int) -> str:
    """Tells a living process from a later one of the same number; empty for a dead one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    try:
        # Linux. After the command in parentheses: state, …, and as the 20th the start in ticks since boot (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return _UNKNOWN
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
