"""The experiments database: what was recorded is read back, by any process, and the dead are told from the living."""

import dataclasses
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nmoe.train.errors import ExperimentsVersionError, UnknownRunError
from nmoe.train.experiments import EvaluationRow, Experiments


@pytest.fixture(scope="module")
def children():
    command = [sys.executable, Path(__file__).with_name("children.py"), "nmoe.train.experiments"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def begin(children, line: str) -> int:
    children.stdin.write(line.encode() + b"\n")
    children.stdin.flush()
    begun, pid = children.stdout.readline().split()
    assert begun == b"begun"
    return int(pid)


def kill(children, pid: int) -> list[int]:
    os.kill(pid, signal.SIGKILL)
    return [int(line.split()[1]) for line in iter(children.stdout.readline, b"ended\n")]


@pytest.fixture
def database(tmp_path):
    with Experiments(tmp_path / "new" / "experiments.db") as database:
        yield database


def start(database: Experiments, run_id: str, **options) -> None:
    database.start(run_id, **{"experiment": "e", "config": "a = 1\n", "steps": 10, **options})


def test_a_run_from_start_to_end(database):
    before = datetime.now(UTC)
    start(database, "r", git_commit="c0ffee", parent_run="p", parent_step=40)
    row = database.get("r")
    assert (row.run_id, row.experiment, row.config, row.git_commit) == ("r", "e", "a = 1\n", "c0ffee")
    assert (row.parent_run, row.parent_step, row.status, row.message) == ("p", 40, "running", None)
    assert (row.step, row.steps, row.train_loss, row.val_loss, row.val_bpb) == (0, 10, None, None, None)
    assert (row.host, row.pid, row.finished) == (socket.gethostname(), os.getpid(), None)
    assert before <= row.started == row.updated <= datetime.now(UTC)

    database.update("r", step=5, train_loss=3.25)
    database.update("r", val_loss=3.5, val_bpb=1.0 / 3.0)
    database.update("r", step=6, train_loss=3.0)
    later = database.get("r")
    assert (later.step, later.train_loss, later.val_loss, later.val_bpb) == (6, 3.0, 3.5, 1.0 / 3.0)
    assert later.updated > row.updated
    assert later.started == row.started

    database.finish("r", "diverged", "loss is NaN at step 7")
    ended = database.get("r")
    assert (ended.status, ended.message, ended.step) == ("diverged", "loss is NaN at step 7", 6)
    assert ended.finished >= later.updated


def test_a_resumed_run_is_the_same_run(database):
    start(database, "r", parent_run="p", parent_step=40)
    database.update("r", step=5, val_loss=3.5)
    database.finish("r", "interrupted", "SIGINT")
    first = database.get("r")
    start(database, "r", step=4, steps=20, config="a = 2\n")
    row = database.get("r")
    assert (row.started, row.parent_run, row.parent_step, row.val_loss) == (first.started, "p", 40, 3.5)
    assert (row.status, row.message, row.finished) == ("running", None, None)
    assert (row.step, row.steps, row.config) == (4, 20, "a = 2\n")
    assert len(database.list()) == 1


def test_the_latest_come_first(database):
    for index in range(5):
        start(database, f"r{index}", experiment=f"e{index % 2}")
    start(database, "r1", step=3)
    assert [row.run_id for row in database.list()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [row.run_id for row in database.list(limit=2)] == ["r4", "r3"]


def test_not_a_number_is_recorded_as_unknown(database):
    start(database, "r")
    database.update("r", train_loss=2.0)
    database.update("r", train_loss=float("nan"))
    assert database.get("r").train_loss is None
    database.update("r", train_loss=float("inf"))
    assert database.get("r").train_loss == float("inf")


def test_the_time_between_an_end_and_its_going_on_is_not_counted(database, monkeypatch):
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]

    def after(hours: float) -> None:
        clock[0] += timedelta(hours=hours)

    monkeypatch.setattr("nmoe.train.experiments._now", lambda: clock[0].isoformat(timespec="microseconds"))
    start(database, "r")
    after(hours=2)
    database.finish("r", "interrupted")
    assert database.get("r").seconds == 2 * 3600
    after(hours=50)
    start(database, "r", step=5)
    assert database.get("r").seconds == 2 * 3600
    after(hours=1)
    database.update("r", step=7)
    assert database.get("r").seconds == 3 * 3600
    after(hours=30)  # killed: the last that was heard of it counts
    database.update("r", val_loss=3.0)  # by another process
    assert database.get("r").seconds == 3 * 3600
    assert database.get("r").val_loss == 3.0
    start(database, "r", step=6)
    after(hours=0.5)
    database.finish("r", "finished")
    assert database.get("r").seconds == 3.5 * 3600
    assert database.get("r").started == datetime(2026, 1, 1, tzinfo=UTC)


def test_an_unknown_run_is_refused_with_the_nearest_name(database):
    for use in (database.get, database.update, lambda run_id: database.finish(run_id, "finished")):
        with pytest.raises(UnknownRunError):
            use("moonlet-1")
    start(database, "moonlet-1")
    for use in (database.get, database.update, lambda run_id: database.finish(run_id, "finished")):
        with pytest.raises(UnknownRunError, match="'moonlet-1'"):
            use("monlet-1")


def test_an_end_is_one_of_those_known(database):
    start(database, "r")
    with pytest.raises(ValueError, match="found 'killed'"):
        database.finish("r", "killed")
    assert database.get("r").status == "running"


def test_reading_makes_no_file(tmp_path):
    database = Experiments(tmp_path / "experiments.db")
    assert database.list() == []
    assert database.evaluations() == []
    with pytest.raises(UnknownRunError):
        database.get("r")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_database_is_refused(database):
    start(database, "r")
    database.close()
    with sqlite3.connect(database.path) as connection:
        connection.execute("PRAGMA user_version = 4")
    with pytest.raises(ExperimentsVersionError, match="at most version 3, found 4"):
        database.list()


def figure(**changes) -> EvaluationRow:
    values = {
        "model": "r", "step": 5, "task": "copa", "version": "1.0", "shots": 0, "metric": "acc", "value": 0.25,
        "stderr": 0.125, "centered": -0.5, "examples": 100, "example_limit": None, "data_sha256": "d", "tokenizer": "t",
    }  # fmt: skip
    return EvaluationRow(**{**values, **changes})


def told(rows) -> list[EvaluationRow]:
    return [dataclasses.replace(row, measured=None) for row in rows]


def test_what_was_measured_is_read_back(database):
    before = datetime.now(UTC)
    rows = [figure(), figure(metric="acc_norm", stderr=None, centered=None), figure(task="core", note="partial (1/22)")]
    database.record_evaluation(rows)
    database.record_evaluation([figure(model="folder", step=None)])
    found = database.evaluations("r")
    assert told(found) == rows
    assert all(before <= row.measured <= datetime.now(UTC) for row in found)
    assert told(database.evaluations(task="copa")) == [*rows[:2], figure(model="folder", step=None)]
    assert told(database.evaluations()) == [*rows, figure(model="folder", step=None)]
    assert database.evaluations("other") == []


def test_a_figure_gives_way_to_the_same_one_alone(database):
    changes = [
        {},
        {"step": 6},
        {"step": None},
        {"task": "x"},
        {"version": "2"},
        {"shots": 1},
        {"shots": None},
        {"max_length": 64},
    ]
    changes += [{"metric": "m"}, {"example_limit": 10}, {"data_sha256": "e"}, {"tokenizer": "u"}, {"model": "s"}]
    database.record_evaluation([figure(**change) for change in changes])
    assert len(database.evaluations()) == len(changes)
    for change in changes:
        database.record_evaluation([figure(**change, value=0.75)])
    assert [row.value for row in database.evaluations()] == [0.75] * len(changes)


def test_figures_are_recorded_all_or_none(database):
    database.record_evaluation([figure()])
    with pytest.raises(sqlite3.IntegrityError):
        database.record_evaluation([figure(task="y"), figure(task=None)])
    assert told(database.evaluations()) == [figure()]
    database.record_evaluation([figure(value=float("nan"))])
    assert database.evaluations()[0].value is None


def test_a_database_of_before_evaluations_is_brought_up_to_date(database):
    start(database, "r")
    database.close()
    with sqlite3.connect(database.path) as connection:  # as the first version made it
        connection.execute("DROP TABLE evaluations")
        for column in ("resumed", "seconds_before"):
            connection.execute(f"ALTER TABLE runs DROP COLUMN {column}")
        connection.execute("UPDATE runs SET updated = started")
        connection.execute("PRAGMA user_version = 1")
    assert database.get("r").status == "running"
    assert database.get("r").seconds == 0.0
    assert database.evaluations() == []
    database.record_evaluation([figure()])
    assert told(database.evaluations()) == [figure()]


def test_a_killed_run_reads_as_killed_and_may_go_on(database, children):
    start(database, "mine")
    child = begin(children, f"experiments {database.path.parent} 0")
    assert children.stdout.readline() == b"did 0\n"
    assert database.get("run").status == "running"
    assert database.get("run").pid == child
    kill(children, child)
    assert {row.run_id: row.status for row in database.list()} == {"run": "killed", "mine": "running"}
    child = begin(children, f"experiments {database.path.parent} 7")
    assert children.stdout.readline() == b"did 7\n"
    assert database.get("run").status == "running"
    kill(children, child)
    database.finish("run", "failed", "seen later")
    assert database.get("run").status == "failed"


def test_an_ended_process_that_nobody_waited_for_is_dead(database):
    child = os.fork()
    if child == 0:
        with Experiments(database.path) as own:
            start(own, "r")
        os._exit(0)
    try:
        while not Path(f"/proc/{child}/stat").exists() or ") Z " not in Path(f"/proc/{child}/stat").read_text():
            if not Path("/proc/self/stat").exists():
                pytest.skip("needs /proc")
            time.sleep(0.01)
        assert database.get("r").status == "killed"
    finally:
        os.waitpid(child, 0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell processes of one number apart")
def test_a_later_process_of_the_same_number_is_not_the_run(database):
    start(database, "r")
    database.close()
    with sqlite3.connect(database.path) as connection:
        mark = connection.execute("SELECT process FROM runs").fetchone()[0]
        boot, _, begun = mark.rpartition(" ")
        connection.execute("UPDATE runs SET process = ?", (f"{boot} {int(begun) - 1}",))
    assert database.get("r").status == "killed"


def test_a_run_on_another_host_is_not_judged(database, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    start(database, "r")
    monkeypatch.undo()
    with sqlite3.connect(database.path) as connection:
        connection.execute("UPDATE runs SET pid = 4194305, process = 'x'")
    assert database.get("r").status == "running"


def test_many_processes_write_a_new_database_at_once(tmp_path, children):
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        begin(children, f"many_runs {folder} 8")
        assert [line.split()[1] for line in iter(children.stdout.readline, b"ended\n")] == [b"8"]
        with Experiments(folder / "experiments.db") as database:
            rows = {row.run_id: row for row in database.list()}
        assert set(rows) == {f"run{index}" for index in range(8)}
        for index in range(8):
            row = rows[f"run{index}"]
            assert (row.status, row.message, row.step, row.val_loss) == ("finished", f"m{index}", 9, index + 0.25)
            assert (row.experiment, row.config) == (f"e{index % 2}", f"c{index}")


def test_opening_waits_for_a_writer(database):
    """SQLite itself gives up at once when asked for the write-ahead log while another process makes the database."""
    database.path.parent.mkdir()
    other = sqlite3.connect(database.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, other.execute, ("COMMIT",))
    timer.start()
    start(database, "r")
    timer.join()
    other.close()
    assert database.get("r").status == "running"


def test_sigkill_loses_nothing_that_was_recorded(tmp_path, children):
    rng = random.Random(3)
    last = 0
    for _ in range(20):
        child = begin(children, f"experiments {tmp_path} {last}")
        lines = [children.stdout.readline() for _ in range(rng.randrange(4))]
        time.sleep(rng.uniform(0.0, 0.01))
        said = [int(line.split()[1]) for line in lines] + kill(children, child)
        with Experiments(tmp_path / "experiments.db") as database:
            rows = database.list()
            if rows:
                assert rows[0].status == "killed"
                assert rows[0].step >= max(said, default=0)
                assert rows[0].train_loss in (None, rows[0].step, rows[0].step - 1)
                last = rows[0].step + 1
            else:
                assert said == []
    assert last > 20
    with sqlite3.connect(tmp_path / "experiments.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
