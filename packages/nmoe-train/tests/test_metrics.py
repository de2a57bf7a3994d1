"""Metrics: every row that was written is read once, whatever was compacted, dropped, killed or read meanwhile."""

import errno
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from nmoe.train import metrics
from nmoe.train.errors import MetricsError
from nmoe.train.metrics import SCHEMA, MetricsWriter, read_metrics

CHILDREN = Path(__file__).with_name("children.py")


def rows_of(table: pa.Table) -> dict[tuple[int, str, int], float]:
    """The table's rows by (step, tag, rank), after checking that each is there once and in order."""
    assert table.schema == SCHEMA
    columns = [table[name].to_pylist() for name in ("tag", "step", "rank")]
    keys = list(zip(*columns, strict=True))
    assert keys == sorted(set(keys))
    return {(step, tag, rank): value for (tag, step, rank), value in zip(keys, table["value"].to_pylist(), strict=True)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_steps(folder: Path, steps, **options) -> MetricsWriter:
    writer = MetricsWriter(folder, **options)
    for step in steps:
        writer.write(step, {"a": step, "b": -step})
    writer.close()
    return writer


def test_one_file_a_step(tmp_path):
    write_steps(tmp_path / "m", [0, 7, 123456789])
    assert names(tmp_path / "m") == ["step_00000000.parquet", "step_00000007.parquet", "step_123456789.parquet"]
    table = read_metrics(tmp_path / "m")
    assert table.schema == SCHEMA
    assert table.to_pylist() == [
        {"step": step, "tag": tag, "value": sign * step, "rank": 0}
        for tag, sign in (("a", 1.0), ("b", -1.0))
        for step in (0, 7, 123456789)
    ]


def test_no_rows_where_there_are_none(tmp_path):
    assert read_metrics(tmp_path / "none") == SCHEMA.empty_table()
    writer = MetricsWriter(tmp_path / "m")
    assert read_metrics(tmp_path / "m") == SCHEMA.empty_table()
    writer.write(1, {})
    writer.drop_after(0)
    assert read_metrics(tmp_path / "m") == SCHEMA.empty_table()


def test_values_are_exact(tmp_path):
    values = {"third": 1 / 3, "tiny": 5e-324, "inf": float("inf"), "nan": float("nan"), "whole": 3, "zero": -0.0}
    write_steps(tmp_path, [])
    MetricsWriter(tmp_path).write(1, values)
    read = {tag: value for (_, tag, _), value in rows_of(read_metrics(tmp_path)).items()}
    assert {tag: float(value).hex() for tag, value in read.items()} == {
        tag: float(value).hex() for tag, value in values.items()
    }


def test_only_the_tags_that_were_asked_for(tmp_path):
    MetricsWriter(tmp_path).write(1, {"a": 1.0, "b": 2.0, "c'\"": 3.0})
    assert {tag for _, tag, _ in rows_of(read_metrics(tmp_path, ["c'\"", "a", "x"]))} == {"a", "c'\""}
    assert rows_of(read_metrics(tmp_path, [])) == {}


def test_a_step_may_be_written_to_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"train": 1.0, "val": 1.5})
    writer.write(1, {"val": 2.0, "more": 3.0})
    assert rows_of(read_metrics(tmp_path)) == {(1, "train", 0): 1.0, (1, "val", 0): 2.0, (1, "more", 0): 3.0}
    assert names(tmp_path) == ["step_00000001.parquet"]


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found -1"):
        MetricsWriter(tmp_path).write(-1, {"a": 1.0})


def test_closed_ranges_are_joined(tmp_path):
    write_steps(tmp_path, range(10, 45), compact_every=10)
    assert names(tmp_path) == [
        *(f"step_000000{step}.parquet" for step in range(40, 45)),
        "steps_00000010-00000019.parquet",
        "steps_00000020-00000029.parquet",
        "steps_00000030-00000039.parquet",
    ]
    assert len(rows_of(read_metrics(tmp_path))) == 70


def test_a_step_is_joined_only_when_it_is_over(tmp_path):
    writer = write_steps(tmp_path, range(10), compact_every=10)
    writer.write(9, {"val": 0.5})
    assert len(names(tmp_path)) == 10
    writer.write(10, {"a": 10})
    writer.close()
    assert names(tmp_path) == ["step_00000010.parquet", "steps_00000000-00000009.parquet"]
    assert rows_of(read_metrics(tmp_path))[9, "val", 0] == 0.5


def test_a_late_value_of_a_joined_step_wins(tmp_path):
    writer = write_steps(tmp_path, range(25), compact_every=10)
    writer.write(5, {"a": 50.0, "val": 0.5})
    expected = {(5, "a", 0): 50.0, (5, "b", 0): -5.0, (5, "val", 0): 0.5}
    for last in (25, 40):
        for step in range(writer_end(tmp_path) + 1, last):
            writer.write(step, {"a": step, "b": -step})
        writer.close()
        rows = rows_of(read_metrics(tmp_path))
        assert {key: value for key, value in rows.items() if key[0] == 5} == expected
        assert len(rows) == 2 * (writer_end(tmp_path) + 1) + 1
    assert "step_00000005.parquet" not in names(tmp_path)


def writer_end(folder: Path) -> int:
    return max(step for step, _, _ in rows_of(read_metrics(folder)))


@pytest.mark.parametrize("step", [-1, 0, 9, 10, 15, 29, 30, 33, 34, 99])
def test_dropping_takes_later_rows_alone(tmp_path, step):
    writer = write_steps(tmp_path, range(35), compact_every=10)
    before = rows_of(read_metrics(tmp_path))
    MetricsWriter(tmp_path).drop_after(step) if step % 2 else writer.drop_after(step)
    assert rows_of(read_metrics(tmp_path)) == {key: value for key, value in before.items() if key[0] <= step}
    assert not [name for name in names(tmp_path) if int(name.removesuffix(".parquet")[-8:]) > step]


def test_ranks_do_not_touch_each_other(tmp_path):
    writers = [MetricsWriter(tmp_path, rank=rank, compact_every=5) for rank in (0, 1, 12)]
    for step in range(12):
        for rank, writer in enumerate(writers):
            writer.write(step, {"a": 100 * rank + step})
    writers[1].drop_after(7)
    for writer in writers:
        writer.close()
    last = {0: 11, 1: 7, 12: 11}
    assert rows_of(read_metrics(tmp_path)) == {
        (step, "a", rank): 100 * index + step for index, rank in enumerate((0, 1, 12)) for step in range(last[rank] + 1)
    }


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_operations_agrees_with_a_dictionary(tmp_path, seed):
    rng = random.Random(seed)
    expected: dict[tuple[int, str, int], float] = {}
    step, every = 0, rng.choice([1, 2, 5, 7])
    writer = MetricsWriter(tmp_path, compact_every=every)
    for _ in range(120):
        action = rng.random()
        if action < 0.75:
            step += rng.randrange(3)
            at = step if rng.random() < 0.9 else rng.randrange(step + 1)
            values = {tag: rng.random() for tag in rng.sample("abcdef", rng.randrange(1, 4))}
            writer.write(at, values)
            expected |= {(at, tag, 0): value for tag, value in values.items()}
        elif action < 0.85:
            writer.close()
            writer = MetricsWriter(tmp_path, compact_every=every)
        elif action < 0.92:
            step = rng.randrange(step + 2) - 1
            writer.drop_after(step)
            expected = {key: value for key, value in expected.items() if key[0] <= step}
            step = max(step, 0)
        else:
            assert rows_of(read_metrics(tmp_path)) == expected
    writer.close()
    assert rows_of(read_metrics(tmp_path)) == expected


@pytest.mark.parametrize("removed", range(6))
def test_a_kill_between_joining_and_removing_doubles_and_loses_nothing(tmp_path, monkeypatch, removed):
    """Parts are removed in any order, as a file system may have it after a power cut."""
    writer = write_steps(tmp_path, range(5), compact_every=5)
    unlink, count = Path.unlink, []

    def stop(path, **options):
        count.append(path)
        if len(count) > removed:
            raise OSError(errno.EIO, "killed here")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        writer.write(5, {"a": 5, "b": -5})
        if removed < 5:
            with pytest.raises(MetricsError, match="killed here"):
                writer.close()
        else:
            writer.close()
    expected = {(step, tag, 0): sign * step for step in range(6) for tag, sign in (("a", 1), ("b", -1))}
    assert rows_of(read_metrics(tmp_path)) == expected
    assert len(names(tmp_path)) == 1 + 1 + 5 - removed

    # The next process finds what is left and joins it again, under the same name if first and last part are left.
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08}.parquet").unlink(missing_ok=True)
    again = MetricsWriter(tmp_path, compact_every=2)
    again._compact()
    again.close()
    assert rows_of(read_metrics(tmp_path)) == expected
    again.drop_after(2)
    assert rows_of(read_metrics(tmp_path)) == {key: value for key, value in expected.items() if key[0] <= 2}


def test_a_failed_join_is_raised_later_and_loses_nothing(tmp_path, monkeypatch):
    writer = write_steps(tmp_path, range(4), compact_every=4)
    write = metrics.write_atomically

    def fail(path, content):
        if path.name.startswith("steps_"):
            raise OSError(errno.ENOSPC, "no space")
        write(path, content)

    monkeypatch.setattr(metrics, "write_atomically", fail)
    writer.write(4, {"a": 4, "b": -4})
    with pytest.raises(MetricsError, match="no space"):
        writer.close()
    writer.close()
    assert len(rows_of(read_metrics(tmp_path))) == 10


def test_a_damaged_file_is_named(tmp_path):
    write_steps(tmp_path, range(5), compact_every=2)
    for name in ("steps_00000000-00000001.parquet", "step_00000004.parquet"):
        content = (tmp_path / name).read_bytes()
        for damaged in (b"", b"torn", content[: len(content) // 2]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(MetricsError, match=name):
                read_metrics(tmp_path)
        (tmp_path / name).write_bytes(content)
    assert len(rows_of(read_metrics(tmp_path))) == 10


def test_foreign_files_do_not_matter(tmp_path):
    write_steps(tmp_path, range(3))
    for name in ("notes.txt", ".step_00000009.parquet.tmp-1", "step_9.parquet", "x.parquet"):
        (tmp_path / name).write_bytes(b"junk")
    assert len(rows_of(read_metrics(tmp_path))) == 6
    MetricsWriter(tmp_path, rank=1)
    assert ".step_00000009.parquet.tmp-1" in names(tmp_path)
    MetricsWriter(tmp_path)
    assert ".step_00000009.parquet.tmp-1" not in names(tmp_path)


def test_any_folder_name_will_do(tmp_path, monkeypatch):
    """Names that DuckDB would read as a pattern or as a column."""
    folder = tmp_path / "step=7" / "a[b]*?'c" / "é"
    write_steps(folder, range(12), compact_every=5)
    assert len(rows_of(read_metrics(folder))) == 24
    monkeypatch.chdir(tmp_path)
    assert len(rows_of(read_metrics(folder.relative_to(tmp_path)))) == 24
    write_steps(tmp_path / "a[b]", range(12), compact_every=5)
    write_steps(tmp_path / "ab", range(12), compact_every=5)
    assert len(rows_of(read_metrics(tmp_path / "a[b]"))) == 24


def test_a_value_for_a_step_that_is_being_joined_is_not_lost(tmp_path, monkeypatch):
    writer = write_steps(tmp_path, range(4), compact_every=4)
    may_join, read = threading.Event(), metrics._read

    def slow(path: Path) -> pa.Table:
        if threading.current_thread().name == "metrics-compaction":
            may_join.wait()
        return read(path)

    monkeypatch.setattr(metrics, "_read", slow)
    writer.write(4, {"a": 4.0})
    threading.Timer(0.2, may_join.set).start()
    writer.write(2, {"val": 0.5})
    writer.close()
    rows = rows_of(read_metrics(tmp_path))
    assert {key[1]: value for key, value in rows.items() if key[0] == 2} == {"a": 2.0, "b": -2.0, "val": 0.5}


def test_reading_a_running_run_sees_all_that_was_written_before(tmp_path):
    written, stop = [0], threading.Event()

    def run() -> None:
        writer = MetricsWriter(tmp_path, compact_every=5)
        while not stop.is_set():
            writer.write(written[0] + 1, {"a": written[0] + 1})
            written[0] += 1
        writer.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(25):
            before = written[0]
            steps = [step for step, _, _ in rows_of(read_metrics(tmp_path))]
            assert steps == list(range(1, len(steps) + 1))
            assert len(steps) >= before
    finally:
        stop.set()
        thread.join()
    assert len(rows_of(read_metrics(tmp_path))) == written[0]


def test_sigkill_at_any_moment(tmp_path):
    """Children continue one run, each killed at a random moment; what each said to have written is there, once."""
    metrics_of = runpy.run_path(str(CHILDREN))["metrics_of"]
    rng = random.Random(5)
    step, highest = 0, 0
    command = [sys.executable, CHILDREN, "nmoe.train.metrics"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as children:
        for _ in range(24):
            children.stdin.write(f"metrics {tmp_path} {step}\n".encode())
            children.stdin.flush()
            child = int(children.stdout.readline().split()[1])
            lines = [children.stdout.readline() for _ in range(rng.randrange(8))]
            time.sleep(rng.uniform(0.0, 0.02))
            os.kill(child, signal.SIGKILL)
            lines += iter(children.stdout.readline, b"ended\n")

            step = max([step, *(int(line.split()[1]) + 1 for line in lines)])
            highest = max(highest, step)
            rows = rows_of(read_metrics(tmp_path))
            expected = {(at, tag, 0): value for at in range(highest + 1) for tag, value in metrics_of(at).items()}
            before = {key: value for key, value in rows.items() if key[0] < step}
            assert before == {key: value for key, value in expected.items() if key[0] < step}
            # The step that was under way may be there, in part. Beyond it is at most what an earlier child wrote, if
            # this one was killed before it had dropped it.
            assert rows.items() <= expected.items()
            assert not lines or max(at for at, _, _ in rows) <= step
            # The next one resumes at an earlier step.
            step -= rng.randrange(3) if step > 3 else 0
        children.stdin.close()
    assert children.returncode == 0
    assert step > 20
    assert [name for name in names(tmp_path) if name.startswith("steps_")]
