"""A run as its watcher sees it."""

import io
import re
from pathlib import Path

import pytest
from nmoe.cli.console import make_console
from nmoe.cli.reporter import LiveReporter, LogReporter, format_step, make_reporter
from nmoe.cli.units import format_bytes, format_count, format_duration, format_flops
from nmoe.train.protocols import RunStart, StepReport
from rich.console import Console

START = RunStart("20261120-x", Path("data/runs/20261120-x"), 1000, 0, 4096, "a small one")


def report(step=120, elapsed=10.0, **changes):
    values = {
        "step": step,
        "steps": 1000,
        "loss": 2.34567,
        "lr": 3e-4,
        "grad_norm": 0.5,
        "ms": 85.25,
        "tokens_per_s": 24_100.0,
        "mfu": 0.431,
        "load_max_over_mean": 1.234,
        "elapsed_s": elapsed,
        "eta_s": 3725.0,
        "memory_bytes": 3 * 2**30,
    }
    return StepReport(**(values | changes))


def terminal(width=100):
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, markup=False, highlight=False, legacy_windows=False
    )


def test_a_step_tells_all_that_is_known():
    assert format_step(report()) == (
        "step  120/1000   12%  loss 2.3457  lr 3.00e-04  grad 0.5  85.2 ms  24.1k tok/s  mfu 43.1%  load 1.23"
        "  mem 3.0 GiB  0:10  eta 1:02:05"
    )


def test_what_is_unknown_is_left_out():
    line = format_step(report(mfu=None, load_max_over_mean=None, memory_bytes=None))
    assert not re.search("mfu|load|mem|None", line)


@pytest.mark.parametrize("width", range(30, 160, 7))
def test_a_step_fits_the_width_and_keeps_what_matters_most(width):
    line = format_step(report(), width)
    assert len(line) <= width
    assert line.startswith("step  120/1000")
    assert "loss 2.3457" in line


def test_a_log_holds_plain_lines_only():
    out = io.StringIO()
    reporter = make_reporter(make_console(out))
    assert isinstance(reporter, LogReporter)
    reporter.start(START)
    reporter.step(report())
    reporter.evaluation(200, {"val/loss": 1.5, "val/bpb": 2.1640})
    reporter.checkpoint(200, Path("data/runs/x/" + "long/" * 60))
    reporter.message("[model] is no markup, :smile: no emoji")
    reporter.close()
    lines = out.getvalue().splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out.getvalue())
    assert len(lines) == 6
    assert lines[0] == "Run 20261120-x starts: 1000 steps of 4096 tokens, in data/runs/20261120-x"
    assert lines[3] == "step 200: val/loss 1.5000  val/bpb 2.1640"
    assert lines[4].endswith("long/long")
    assert lines[5] == "[model] is no markup, :smile: no emoji"


@pytest.mark.parametrize(("seconds", "most"), [(120, 70), (3600, 250), (8 * 3600, 700)])
def test_a_log_grows_slower_than_the_run_and_never_misses_first_and_last(seconds, most):
    out = io.StringIO()
    reporter = LogReporter(make_console(out))
    reporter.start(START)
    for step in range(1, seconds * 4 + 1):
        reporter.step(report(step, step / 4, steps=seconds * 4))
    lines = out.getvalue().splitlines()[2:]
    assert lines[0].split("/")[0].split()[-1] == "1"
    assert lines[-1].split("/")[0].split()[-1] == str(seconds * 4)
    assert 20 < len(lines) < most


def test_slow_steps_are_all_logged():
    out = io.StringIO()
    reporter = LogReporter(make_console(out))
    for step in range(1, 11):
        reporter.step(report(step, step * 70.0))
    assert len(out.getvalue().splitlines()) == 10


def test_a_resumed_run_says_where_from():
    out = io.StringIO()
    LogReporter(make_console(out)).start(RunStart("r", Path("p"), 1000, 400, 4096, ""))
    assert out.getvalue() == "Run r resumes after step 400: 1000 steps of 4096 tokens, in p\n"


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_terminal_shows_one_live_line_under_what_was_said(width):
    console = terminal(width)
    reporter = make_reporter(console)
    assert isinstance(reporter, LiveReporter)
    reporter.start(START)
    for step in (1, 2, 3):
        reporter.step(report(step))
    reporter.evaluation(3, {"val/bpb": 2.0})
    reporter.message("said")
    reporter.step(report(1000))
    reporter.close()
    reporter.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert "step 3: val/bpb 2.0000" in lines
    assert lines[-1].startswith("step 1000/1000")
    assert max(map(len, lines)) <= width


def test_closing_before_the_start_writes_nothing():
    console = terminal()
    LiveReporter(console).close()
    assert console.file.getvalue().strip() == ""


def test_a_dumb_terminal_gets_the_log(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_reporter(terminal()), LogReporter)


def test_the_run_outlives_the_logs_reader():
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    reporter = LogReporter(make_console(Gone()))
    reporter.start(START)
    for step in (1, 500, 1000):
        reporter.step(report(step, elapsed=step * 10.0))
    reporter.message("unheard")
    reporter.close()


def test_units():
    durations = [format_duration(seconds) for seconds in (0, 59.6, 61, 3600, 86400 * 2 + 3700)]
    assert durations == ["0:00", "1:00", "1:01", "1:00:00", "2d 1h"]
    assert [format_count(x) for x in (7, 999, 1000, 24_060, 7.34e9)] == ["7", "999", "1.00k", "24.1k", "7.34B"]
    assert [format_flops(x) for x in (12, 9.21e9, 3.02e14)] == ["12 FLOP", "9.21 GFLOP", "302 TFLOP"]
    assert [format_bytes(x) for x in (512, 2**20, 109 * 2**30)] == ["0.5 KiB", "1.0 MiB", "109.0 GiB"]
