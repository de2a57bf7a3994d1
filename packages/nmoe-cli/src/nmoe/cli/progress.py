"""How far prep is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nmoe.cli.console import is_live, print_line
from nmoe.cli.units import format_count, format_duration
from nmoe.data.prep import Progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

_LOG_GAP_S = 30.0


@contextmanager
def prep_progress(console: Console, max_tokens: int | None = None) -> Iterator[Callable[[Progress], None]]:
    """Shows what it is called with: a bar in a terminal, a line each half minute in a log.

    `max_tokens`: where prep ends at the latest.
    """
    if not is_live(console):
        yield _LogProgress(console, max_tokens)
        return
    with Bars(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        pace = _Pace(max_tokens)

        def show(now: Progress) -> None:
            part = pace.part(now)
            total = None if part is None else 1.0
            bars.update(task, description=pace.line(now), completed=part or 0.0, total=total)

        yield show


def notice_printer(console: Console, error_console: Console) -> Callable[[str], None]:
    """Prints what a person should know meanwhile: above the bar where there is one, else to standard error."""
    target = console if is_live(console) else error_console
    return lambda text: print_line(target, text)


class _Pace:
    """What was done since the first call, in words."""

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._first: tuple[float, Progress] | None = None

    def part(self, now: Progress) -> float | None:
        """How much of all is done, from 0 to 1, where that can be told."""
        parts = [now.read / now.total] if now.total else []
        if self._max_tokens:
            parts.append(now.tokens / self._max_tokens)
        return min(1.0, max(parts)) if parts else None

    def line(self, now: Progress) -> str:
        """Documents, tokens, tokens a second, time left."""
        if self._first is None:
            self._first = time.monotonic(), now
        began, first = self._first
        seconds = time.monotonic() - began
        words = [f"{now.documents:,} documents", f"{format_count(now.tokens)} tokens"]
        if now.tokens > first.tokens and seconds > 0:
            words.append(f"{format_count((now.tokens - first.tokens) / seconds)} tokens/s")
            done, before = self.part(now), self.part(first)
            if done is not None and before is not None and done > before:
                words += [f"{done:.0%}", f"{format_duration(seconds * (1 - done) / (done - before))} left"]
        return ", ".join(words)


class _LogProgress:
    def __init__(self, console: Console, max_tokens: int | None) -> None:
        self._console = console
        self._pace = _Pace(max_tokens)
        self._printed = time.monotonic()

    def __call__(self, now: Progress) -> None:
        line, moment = self._pace.line(now), time.monotonic()
        if moment - self._printed >= _LOG_GAP_S:
            self._printed = moment
            print_line(self._console, line)
