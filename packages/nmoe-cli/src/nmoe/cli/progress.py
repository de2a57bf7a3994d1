"""How far along a job over documents is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nmoe.cli.console import is_live, print_line
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LOG_GAP_S = 30.0


@contextmanager
def document_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows what it is called with, (done, total): a bar in a terminal, a line each half minute in a log."""
    if not is_live(console):
        yield _LogProgress(console)
        return
    columns = (TextColumn("documents"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _LogProgress:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed >= _LOG_GAP_S:
            self._printed = now
            print_line(self._console, f"{done} of {total} documents")
