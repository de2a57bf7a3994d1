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
    Perfetto. Of a range that is made in part, that part is recorded. Without steps it does nothing."""

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, device: torch.device, *, first_step: int = 1
    ) -> None:
        """Names what to record; nothing starts before the `with` block.

        Args:
            steps: first and last step to record; None: none.
            folder: where the trace goes; made when there is one.
            device: its kernels are recorded, besides what the CPU does.
            first_step: the step that comes next; not 1 in a run that is continued.
        """
        self.steps, self.first_step = steps, first_step
        self.path = folder / "trace.json"
        """Where the trace is, if `recorded` names steps."""
        self.recorded: tuple[int, int] | None = None
        """First and last step in the written trace; None: there is none, as no step of the range was made."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True) if steps is not None else None
        self._device = device
        self._running = False
        self._ended: list[int] = []

    @property
    def written(self) -> bool:
        """Whether a trace was written; known once the `with` block has ended."""
        return self.recorded is not None

    def __enter__(self) -> Self:
        self._before(self.first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, done: int) -> None:
        """Step `done` has ended."""
        if self.steps is None:
            return
        if self._running:
            self._ended.append(done)
            if done >= self.steps[1]:
                self._stop()
        else:
            self._before(done + 1)

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """A named part of a step, shown in the trace."""
        if not self._running:
            yield
            return
        with torch.profiler.record_function(name):
            yield

    def _before(self, step: int) -> None:
        if self._profiler is not None and self.steps is not None and self.steps[0] <= step <= self.steps[1]:
            self._await_device()
            self._profiler.start()
            self._running = True

    def _stop(self) -> None:
        if self._profiler is not None and self._running:
            self._running = False
            self._await_device()
            self._profiler.stop()
            if not self._ended:
                return  # the run ended just before the range
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self.path))
            self.recorded = self._ended[0], self._ended[-1]

    def _await_device(self) -> None:
        """The host runs ahead of a GPU: without this, kernels of other steps would be in the trace, or some missing."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
