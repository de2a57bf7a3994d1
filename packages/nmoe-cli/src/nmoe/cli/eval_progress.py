"""How far an evaluation is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nmoe.cli.console import is_live, print_line
from nmoe.cli.units import format_duration
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_GAP_S = 30.0


@contextmanager
def eval_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows what it is called with, a task and how much of how much of it is done: a bar in a terminal, a line each
    half minute in a log."""
    pace = _Pace()
    if not is_live(console):
        printed = time.monotonic()

        def log(task: str, done: int, total: int) -> None:
            nonlocal printed
            line, moment = pace.line(task, done, total), time.monotonic()
            if moment - printed >= _LOG_GAP_S:
                printed = moment
                print_line(console, line)

        yield log
        return
    text = TextColumn("{task.description}", markup=False)
    with Progress(BarColumn(), text, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None)

        def show(task: str, done: int, total: int) -> None:
            bars.update(bar, description=pace.line(task, done, total), completed=done, total=total)

        yield show


class _Pace:
    """What was done of a task since it began, in words."""

    def __init__(self) -> None:
        self._task, self._began = "", 0.0

    def line(self, task: str, done: int, total: int) -> str:
        """Task, share, time left."""
        if task != self._task:
            self._task, self._began = task, time.monotonic()
        words = [task, f"{done / total:.0%}"]
        seconds = time.monotonic() - self._began
        if 0 < done < total and seconds > 0:
            words.append(f"{format_duration(seconds * (total - done) / done)} left")
        return "  ".join(words)
