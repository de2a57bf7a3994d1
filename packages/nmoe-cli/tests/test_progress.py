"""What a person sees of prep while it runs."""

import io

import nmoe.cli.progress
import pytest
from nmoe.cli.console import make_console
from nmoe.cli.progress import prep_progress
from nmoe.cli.units import parse_count
from nmoe.data.prep import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(nmoe.cli.progress.time, "monotonic", lambda: now[0])
    return now


def lines(clock, steps, max_tokens=None):
    out = io.StringIO()
    clock[0] = 100.0
    with prep_progress(make_console(out), max_tokens) as progress:
        for seconds, now in steps:
            clock[0] = 100.0 + seconds
            progress(now)
    return out.getvalue().splitlines()


def test_a_log_gets_a_line_now_and_then(clock):
    # What an earlier run did counts for how much is left, not for the pace.
    begun = Progress(documents=1000, tokens=5_000_000, read=10_000, total=50_000)
    steps = [(0, begun)]
    for seconds in (10, 31, 40, 62):
        done = Progress(
            documents=1000 + 100 * seconds,
            tokens=5_000_000 + 50_000 * seconds,
            read=10_000 + 200 * seconds,
            total=50_000,
        )
        steps.append((seconds, done))
    assert lines(clock, steps) == [
        "4,100 documents, 6.55M tokens, 50.0k tokens/s, 32%, 2:49 left",
        "7,200 documents, 8.10M tokens, 50.0k tokens/s, 45%, 2:18 left",
    ]


def test_a_limit_ends_it_sooner_and_an_unknown_size_has_no_end(clock):
    steps = [(0, Progress()), (40, Progress(documents=5, tokens=4000, read=10, total=1000))]
    assert lines(clock, steps, max_tokens=8000) == ["5 documents, 4.00k tokens, 100 tokens/s, 50%, 0:40 left"]
    steps = [(0, Progress()), (40, Progress(documents=5, tokens=4000))]
    assert lines(clock, steps) == ["5 documents, 4.00k tokens, 100 tokens/s"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("5000", 5000), ("5_000", 5000), ("100k", 100_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("0.1T", 10**11)],
)
def test_counts_are_read_as_people_write_them(text, value):
    assert parse_count(text) == parse_count(text.lower()) == value


@pytest.mark.parametrize("text", ["", "k", "many", "1.5", "-3", "nan", "inf", "3 x"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises((ValueError, ArithmeticError)):
        parse_count(text)
