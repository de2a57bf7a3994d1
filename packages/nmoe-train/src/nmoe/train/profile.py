"""A torch-profiler trace of chosen steps, with named ranges."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity


class StepProfiler:
    """Records the steps from the first to the last of `steps` and writes `<folder>/trace.json` for chrome://tracing or
    Perfetto. Without steps it does nothing."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device) -> None:
        self.steps, self.path = steps, folder / "trace.json"
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True) if steps is not None else None
        self._running = False

    def __enter__(self) -> Self:
        if self.steps is not None and self.steps[0] <= 1:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, done: int) -> None:
        """Step `done` has ended."""
        if self.steps is None:
            return
        if self._running and done >= self.steps[1]:
            self._stop()
        elif not self._running and self.steps[0] - 1 <= done < self.steps[1]:
            self._start()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A named part of a step, shown in the trace."""
        if not self._running:
            yield
            return
        with torch.profiler.record_function(name):
            yield

    def _start(self) -> None:
        if self._profiler is not None:
            self._profiler.start()
            self._running = True

    def _stop(self) -> None:
        if self._profiler is not None and self._running:
            self._running = False
            self._profiler.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))
