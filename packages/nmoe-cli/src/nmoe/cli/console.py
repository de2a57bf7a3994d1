"""Text for a person: in a terminal with rich's means, in a log file as plain lines."""

import errno
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves what to do to the caller; rich would end the process with 1."""
        raise BrokenPipeError(errno.EPIPE, "whoever read the output has gone")


def make_console(file: IO[str]) -> Console:
    """A console that writes to `file` and never reads meaning into text (`[model]` is no markup here).

    Writing raises BrokenPipeError once whoever reads has gone.
    """
    return _Console(file=file, markup=False, emoji=False, highlight=False)


def is_live(console: Console) -> bool:
    """Whether `console` is a terminal that can redraw a line."""
    return console.is_terminal and not console.is_dumb_terminal


def print_line(console: Console, text: str) -> None:
    """Prints one line; a log gets it whole, however long, a terminal wrapped at words."""
    console.print(Text(text), soft_wrap=not is_live(console))


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows under a header, aligned; the last column takes what room is left."""
    if is_live(console):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in header:
            table.add_column(name, no_wrap=name != header[-1], overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print_line(console, "  ".join(cells).rstrip())


def print_summary(
    console: Console, title: str, rows: Sequence[tuple[str, str]], next_steps: Sequence[str] = ()
) -> None:
    """Prints what came of a run, and the commands to try next.

    Args:
        console: where to.
        title: one line.
        rows: label and value each.
        next_steps: a command each, with a word on it if need be.
    """
    if is_live(console):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(*map(Text, row))
        console.print(Panel(grid, title=Text(title), title_align="left", expand=False))
    else:
        width = max((len(label) for label, _ in rows), default=0)
        print_line(console, f"== {title}")
        for label, value in rows:
            print_line(console, f"{label.ljust(width)}  {value}")
    # Outside the frame, and broken by the terminal if at all: so that a command can be copied.
    for line in ["Next:", *(f"  {step}" for step in next_steps)] if next_steps else []:
        console.print(Text(line), soft_wrap=True)
