"""`n runs`: what ran, and how it stands."""

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_table
from nmoe.cli.context import Injected
from nmoe.cli.errors import UsageError
from nmoe.cli.units import format_duration

if TYPE_CHECKING:
    from nmoe.train.experiments import RunRow

_HEADER = ("run", "status", "step", "loss", "val loss", "bits/byte", "started", "took", "from", "message")


def runs(
    *,
    limit: Annotated[int, Parameter(help="The latest so many.")] = 20,
    context: Injected,
) -> None:
    """List runs, the latest first, with their state and losses."""
    from nmoe.train.experiments import Experiments

    if limit < 1:
        raise UsageError(f"--limit: expected 1 or more, found {limit}")
    with Experiments(context.data_root / "experiments.db") as experiments:
        rows = list(experiments.list(limit + 1))
    if not rows:
        print_line(
            context.console, f"No runs under {context.data_root}. The first: {context.command} train configs/nano.toml"
        )
        return
    table = [_cells(row) for row in rows[:limit]]
    # A column that nothing stands in only costs width.
    shown = [place for place, name in enumerate(_HEADER) if any(cells[place] for cells in table)]
    print_table(
        context.console, [_HEADER[place] for place in shown], [[row[place] for place in shown] for row in table]
    )
    if len(rows) > limit:
        print_line(context.console, f"Older runs: n runs --limit {limit * 5}")


def _cells(row: "RunRow") -> tuple[str, ...]:
    parent = row.parent_run or ""
    if row.parent_run and row.parent_step is not None:
        parent = f"{row.parent_run}@{row.parent_step}"
    return (
        row.run_id,
        row.status,
        f"{row.step}/{row.steps}",
        _loss(row.train_loss),
        _loss(row.val_loss),
        _loss(row.val_bpb),
        f"{row.started.astimezone():%Y-%m-%d %H:%M}",
        format_duration(row.seconds),
        parent,
        (row.message or "").partition("\n")[0],
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
