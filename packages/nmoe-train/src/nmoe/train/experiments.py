"""The experiments database: one row a run, in SQLite, written by many processes."""

import os
import socket
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from nmoe.train.errors import ExperimentsVersionError, UnknownRunError

EndStatus = Literal["finished", "interrupted", "failed", "diverged"]
Status = Literal["running", "finished", "interrupted", "failed", "diverged", "killed"]

_VERSION = 1
_BUSY_SECONDS = 30.0
_UNKNOWN = "alive"
"""The mark of a living process whose start cannot be seen: no Linux, or another user's."""
_SCHEMA = """
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
"""


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
        values = {
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
        renewed = [key for key in values if key not in ("run_id", "started", "parent_run", "parent_step")]
        connection = self._open()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR IGNORE INTO experiments VALUES (?, ?)", (experiment, now))
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
        """Records a run's progress; what is `None` stays as it was.

        Raises:
            UnknownRunError: the database has no such run.
        """
        values = {"step": step, "train_loss": train_loss, "val_loss": val_loss, "val_bpb": val_bpb}
        self._set(run_id, {key: value for key, value in values.items() if value is not None})

    def finish(self, run_id: str, status: EndStatus, message: str | None = None) -> None:
        """Records how a run ended.

        Raises:
            UnknownRunError: the database has no such run.
        """
        if status not in get_args(EndStatus):
            raise ValueError(f"status: expected one of {', '.join(get_args(EndStatus))}, found {status!r}")
        self._set(run_id, {"status": status, "message": message, "finished": _now()})

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
        values = {**values, "updated": _now()}
        changes = ", ".join(f"{key} = :{key}" for key in values)
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
        if _version(connection) == 0:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                # Another process may have been first while this one waited.
                if _version(connection) == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {_VERSION}")
        if _version(connection) > _VERSION:
            raise ExperimentsVersionError(path, _version(connection), _VERSION)
    except BaseException:
        connection.close()
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
    for key in ("started", "updated", "finished"):
        values[key] = datetime.fromisoformat(values[key]) if values[key] is not None else None
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
