"""The trace holds the steps that were asked for, wherever a run begins and ends."""

import json
from pathlib import Path

import pytest
import torch
from nmoe.train.profile import StepProfiler

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    with profiler:
        for step in range(first, last + 1):
            with profiler.range(f"step {step}"):
                torch.ones(4).sum()
            profiler.step(step)


def traced(profiler: StepProfiler) -> list[int]:
    events = json.loads(profiler.path.read_text())["traceEvents"]
    return sorted({int(event["name"].split()[1]) for event in events if event.get("name", "").startswith("step ")})


@pytest.mark.parametrize(
    ("asked", "first", "last", "expected"),
    [
        ((1, 2), 1, 6, [1, 2]),
        ((3, 3), 1, 6, [3]),
        ((5, 6), 5, 8, [5, 6]),  # the first step after a resume
        ((1, 6), 5, 8, [5, 6]),  # the part that this process makes
        ((7, 9), 5, 8, [7, 8]),  # the run ends within the range
        ((8, 8), 5, 8, [8]),
    ],
)
def test_exactly_the_steps_asked_for_are_recorded(
    tmp_path: Path, asked: tuple[int, int], first: int, last: int, expected: list[int]
) -> None:
    profiler = StepProfiler(asked, tmp_path / "profile", CPU, first_step=first)
    run_steps(profiler, first, last)
    assert profiler.written
    assert profiler.recorded == (expected[0], expected[-1])
    assert traced(profiler) == expected


@pytest.mark.parametrize("asked", [None, (1, 1), (1, 4), (9, 9), (20, 30)])
def test_a_range_that_is_not_reached_writes_nothing_and_says_so(tmp_path: Path, asked: tuple[int, int] | None) -> None:
    profiler = StepProfiler(asked, tmp_path / "profile", CPU, first_step=5)
    run_steps(profiler, 5, 8)
    assert not profiler.written
    assert profiler.recorded is None
    assert not profiler.path.exists()


def test_what_a_failing_run_had_recorded_is_kept(tmp_path: Path) -> None:
    profiler = StepProfiler((1, 9), tmp_path / "profile", CPU)

    def fail() -> None:
        with profiler:
            profiler.step(1)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert profiler.recorded == (1, 1)
    assert profiler.path.exists()
