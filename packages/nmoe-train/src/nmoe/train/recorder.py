"""What steps gave, read a step late and told: to the metrics, to a person, and as an error where a step was refused."""

import math
import time
from collections import deque
from collections.abc import Callable

from nmoe.rdep.errors import WorldError
from nmoe.rdep.transport import Transport
from nmoe.train.clock import Clock
from nmoe.train.errors import NonFiniteError, PeerFaultError
from nmoe.train.figures import StepFigures
from nmoe.train.metrics import MetricsWriter, NoMetrics
from nmoe.train.protocols import Reporter, StepReport
from nmoe.train.schema import TrainingConfig
from nmoe.train.step import LaunchedStep, TrainStep

STEPS_LATE = {"cpu": 0, "cuda": 1}
"""How many steps behind the device the host reads what they gave."""


class Recorder:
    """Reads what steps gave, a step late on a GPU, which is never idle for it, and tells metrics and reporter."""

    def __init__(
        self,
        config: TrainingConfig,
        train_step: TrainStep,
        transport: Transport,
        clock: Clock,
        metrics: MetricsWriter | NoMetrics,
        reporter: Reporter,
    ) -> None:
        self.config, self.train_step, self.transport, self.clock = config, train_step, transport, clock
        self.metrics, self.reporter = metrics, reporter
        self.loss: float | None = None
        """The last recorded training loss."""
        self.signal: int | None = None
        """The number of the first signal that any rank was told to have got."""
        self._late = STEPS_LATE[config.runtime.device]
        self._launched: deque[LaunchedStep] = deque()

    def add(self, launched: LaunchedStep) -> None:
        """Takes a step that was just launched, and records the one that is late enough.

        Raises:
            NonFiniteError: that step was not applied, nor was any after it.
            NotReproducibleError, PeerFaultError, PeerTimeoutError, CapacityError: the same.
        """
        self._launched.append(launched)
        while len(self._launched) > self._late:
            self._record(self._launched.popleft())

    def finish(self) -> None:
        """Records all: every step launched has been applied.

        Raises:
            NonFiniteError, NotReproducibleError, PeerFaultError, PeerTimeoutError, CapacityError: as `add`.
        """
        while self._launched:
            self._record(self._launched.popleft())

    def _record(self, launched: LaunchedStep) -> None:
        faults = self.transport.faults
        figures = launched.wait(self._watch(launched) if self.transport.world.size > 1 else None)
        self.clock.lap(launched.ended)
        faults.check()  # the cause, where there is one, comes before what it led to
        if figures.faulty:
            raise PeerFaultError(launched.step, figures.faulty)
        self._refuse_non_finite(launched, figures)
        if figures.differing:
            raise self.train_step.not_reproducible(launched)
        self.loss = figures.loss
        self.signal = self.signal or figures.signal
        step, steps = launched.step, self.config.train.steps
        if step % self.config.metrics.every and step != steps:
            return
        worst = [value for tag, value in figures.health.items() if tag.endswith("max_over_mean")]
        report = StepReport(
            step=step,
            steps=steps,
            loss=figures.loss,
            lr=self.config.optim.lr_dense * launched.lr_factor,
            grad_norm=figures.grad_norm,
            load_max_over_mean=max(worst) if worst else None,
            **self.clock.figures(step, steps),
        )
        self.metrics.write(step, {**_tags(report), "train/total_loss": figures.total_loss, **figures.health})
        self.reporter.step(report)

    def _watch(self, launched: LaunchedStep) -> Callable[[], None]:
        """What to look at while a step of several ranks has not ended: a rank that hangs keeps the others' collectives,
        which have no deadline of their own, and so the step from ever ending."""
        limit_s = 2 * self.config.rdep.timeout_s
        deadline = time.monotonic() + limit_s

        def check() -> None:
            self.transport.faults.check()
            if time.monotonic() > deadline:
                raise WorldError(
                    f"expected step {launched.step} to end within {limit_s:g} s, found that it has not: a rank hangs "
                    "outside of an exchange; see what the ranks said last; if steps take so long, raise rdep.timeout_s"
                )

        return check

    def _refuse_non_finite(self, launched: LaunchedStep, figures: StepFigures) -> None:
        size = self.config.train.micro_batch_size
        for i, losses in enumerate(figures.losses):
            if not all(map(math.isfinite, losses)):
                first = launched.cursor + i * size
                where = f"micro-batch {i}, samples {first} to {first + size - 1}"
                raise NonFiniteError(launched.step, "the loss", where)
        if math.isfinite(figures.grad_norm):
            return
        names = self.train_step.not_finite(launched)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise NonFiniteError(launched.step, "the gradient", f"of {shown}" if names else "its norm overflows")


def _tags(report: StepReport) -> dict[str, float]:
    tags = {
        "train/loss": report.loss,
        "train/lr": report.lr,
        "train/grad_norm": report.grad_norm,
        "perf/ms_step": report.ms,
        "perf/tokens_per_s": report.tokens_per_s,
        "perf/mfu": report.mfu,
        "perf/memory_bytes": None if report.memory_bytes is None else float(report.memory_bytes),
    }
    return {tag: value for tag, value in tags.items() if value is not None}
