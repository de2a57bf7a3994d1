"""A training run as a person follows it: one live line in a terminal, a growing one in a log file."""

from collections.abc import Mapping
from pathlib import Path

from nmoe.cli.console import is_live, print_line
from nmoe.cli.units import format_bytes, format_count, format_duration
from nmoe.train.protocols import Reporter, RunStart, StepReport
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

_BAR_FROM_WIDTH = 120


def make_reporter(console: Console) -> Reporter:
    """The reporter that suits where `console` writes to."""
    return LiveReporter(console) if is_live(console) else LogReporter(console)


def format_step(report: StepReport, width: int | None = None) -> str:
    """A step on one line: step, %, loss, lr, ms, tok/s, MFU, load max/mean, elapsed, ETA; what is unknown is left out.

    Args:
        report: the step.
        width: characters that there are; the least needed parts are left out to fit. None: all there is.
    """
    digits = len(str(report.steps))
    # (needed: the higher, the longer it stays; text)
    parts: list[tuple[int, str]] = [
        (9, f"step {report.step:>{digits}}/{report.steps}"),
        (6, f"{report.step / report.steps:>4.0%}"),
        (9, f"loss {report.loss:.4f}"),
        (2, f"lr {report.lr:.2e}"),
        (1, f"grad {report.grad_norm:.3g}"),
        (4, f"{_milliseconds(report.ms)} ms"),
        (7, f"{format_count(report.tokens_per_s)} tok/s"),
    ]
    if report.mfu is not None:
        parts.append((5, f"mfu {report.mfu:.1%}"))
    if report.load_max_over_mean is not None:
        parts.append((3, f"load {report.load_max_over_mean:.2f}"))
    if report.memory_bytes is not None:
        parts.append((0, f"mem {format_bytes(report.memory_bytes)}"))
    parts += [(4, format_duration(report.elapsed_s)), (8, f"eta {format_duration(report.eta_s)}")]
    while width is not None and len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        parts.remove(min(parts, key=lambda part: part[0]))
    return "  ".join(text for _, text in parts)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _begin(run: RunStart) -> str:
    verb = f"resumes after step {run.start_step}" if run.start_step else "starts"
    return f"Run {run.run_id} {verb}: {run.steps} steps of {run.tokens_per_step} tokens, in {run.path}"


def _values(step: int, values: Mapping[str, float]) -> str:
    return f"step {step}: " + "  ".join(f"{tag} {value:.4f}" for tag, value in values.items())


class NullReporter:
    """Says nothing: every rank but the first has one."""

    def start(self, run: RunStart) -> None:
        """Nothing."""

    def step(self, report: StepReport) -> None:
        """Nothing."""

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def checkpoint(self, step: int, path: Path) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LogReporter:
    """Plain lines without control characters, ever further apart.

    Steps are printed at the first and the last one, and in between 2 s apart at first and a minute in long runs: the
    gap is a fiftieth of the time run, so a log of any length stays readable. Evaluations, checkpoints and messages are
    always printed. Once the log's reader has gone (`n train … | head`), nothing is printed, and the run goes on.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed_s: float | None = None
        self._is_read = True

    def start(self, run: RunStart) -> None:
        """Prints what runs and where."""
        self.message(_begin(run))
        if run.description:
            self.message(run.description)
        self._printed_s = None

    def step(self, report: StepReport) -> None:
        """Prints the step, if it is the first or the last or the gap has passed."""
        gap = min(60.0, max(2.0, report.elapsed_s / 50))
        due = self._printed_s is None or report.elapsed_s - self._printed_s >= gap
        if due or report.step >= report.steps:
            self._printed_s = report.elapsed_s
            self.message(format_step(report))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Prints every value."""
        self.message(_values(step, values))

    def checkpoint(self, step: int, path: Path) -> None:
        """Prints the checkpoint's place."""
        self.message(f"step {step}: checkpoint {path}")

    def message(self, text: str) -> None:
        """Prints the text."""
        if not self._is_read:
            return
        try:
            print_line(self._console, text)
            self._console.file.flush()  # a log is read while it grows
        except BrokenPipeError:
            self._is_read = False

    def close(self) -> None:
        """Nothing is held open."""


class LiveReporter:
    """One line at the bottom of a terminal that follows the steps; all else scrolls above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        bar = [BarColumn(bar_width=None)] if console.width >= _BAR_FROM_WIDTH else []
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        self._progress = Progress(text, *bar, console=console, refresh_per_second=4)
        self._task = self._progress.add_task("", total=None, visible=False)

    def start(self, run: RunStart) -> None:
        """Prints what runs and where, and opens the line."""
        print_line(self._console, _begin(run))
        if run.description:
            print_line(self._console, run.description)
        self._progress.update(self._task, total=run.steps, completed=run.start_step, visible=True)
        self._progress.update(self._task, description="waiting for the first step …")
        self._progress.start()

    def step(self, report: StepReport) -> None:
        """Redraws the line."""
        width = self._console.width - (24 if self._console.width >= _BAR_FROM_WIDTH else 1)
        self._progress.update(self._task, completed=report.step, description=format_step(report, width))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Prints every value above the line."""
        print_line(self._console, _values(step, values))

    def checkpoint(self, step: int, path: Path) -> None:
        """Prints the checkpoint's place above the line."""
        print_line(self._console, f"step {step}: checkpoint {path}")

    def message(self, text: str) -> None:
        """Prints the text above the line."""
        print_line(self._console, text)

    def close(self) -> None:
        """Leaves the last line standing; may be called twice."""
        self._progress.stop()
