"""What an evaluation found: on screen, on disk, in the experiments database."""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from nmoe.cli.console import print_line, print_table
from nmoe.cli.context import Context
from nmoe.eval.results import Results, Row
from nmoe.train.errors import TrainError
from nmoe.train.experiments import EvaluationRow, Experiments
from rich.console import Console

_HEADER = ("task", "version", "shots", "metric", "value", "centered", "examples", "note")


def show(console: Console, results: Results) -> None:
    """The table, and what a reader of it must know."""
    rows = [_cells(row) for row in results.rows()]
    shown = [place for place in range(len(_HEADER)) if any(cells[place] for cells in rows)]
    print_table(console, [_HEADER[place] for place in shown], [[cells[place] for place in shown] for cells in rows])
    for warning in results.warnings:
        print_line(console, f"Note: {warning}")


def results_folder(
    parent: Path,
    step: int | None,
    names: Sequence[str],
    *,
    limit: int | None = None,
    data: Path | None = None,
    seq_len: int | None = None,
) -> Path:
    """Where results go by default: what was asked for names the folder, so that asking again writes the same files, and
    asking for something else leaves them.

    Args:
        parent: the run's folder, or an imported model's.
        step: of the checkpoint.
        names: of the tasks.
        limit: examples of each.
        data: the folder that was named for their data.
        seq_len: that was asked for in place of the run's own.
    """
    asked = _short("+".join(names).replace("/", ".").replace(":", "-"), 100)
    if limit is not None:
        asked += f"-first-{limit}"
    if seq_len is not None:
        asked += f"-seq-{seq_len}"
    if data is not None:  # two folders may have the same name
        asked += f"-of-{_short(data.resolve().name, 60)}-{_digest(str(data.resolve()))[:8]}"
    return (parent / "eval" if step is None else parent / "eval" / f"step_{step:08d}") / asked


def _short(name: str, most: int) -> str:
    """A file system's names have a longest length, in bytes."""
    kept = name.encode()
    return name if len(kept) <= most else f"{kept[: most - 13].decode(errors='ignore')}-{_digest(name)[:12]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_rows(results: Results, model: str, step: int | None) -> list[EvaluationRow]:
    """The table as the experiments database keeps it. Figures of several tasks together carry a digest of these tasks'
    data."""
    found = [
        _kept(row, results, model, step, task.data_sha256, task.limit) for task in results.tasks for row in task.rows()
    ]
    for row in results.summaries:
        parts = [task for task in results.tasks if task.task.startswith(f"{row.task}/")]
        digest = _digest("".join(task.data_sha256 for task in parts))
        found.append(_kept(row, results, model, step, digest, parts[0].limit if parts else None))
    return found


def record(results: Results, model: str, step: int | None, context: Context) -> None:
    """Puts the table into the experiments database; where that fails, says so, and the results stand."""
    try:
        with Experiments(context.data_root / "experiments.db") as experiments:
            experiments.record_evaluation(evaluation_rows(results, model, step))
    except (TrainError, sqlite3.Error, OSError) as error:
        print_line(context.error_console, f"The results stand, and the experiments database lacks them: {error}")


def _kept(
    row: Row, results: Results, model: str, step: int | None, data_sha256: str, limit: int | None
) -> EvaluationRow:
    return EvaluationRow(
        model, step, row.task, row.version, row.shots, row.metric, row.value, row.stderr, row.centered, row.n, limit,
        data_sha256, results.tokenizer, results.about.get("max_length"), row.note,
    )  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    value = f"{row.value:.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.4f}")
    centered = "" if row.centered is None else f"{row.centered:.4f}"
    shots = "" if row.shots is None else str(row.shots)
    return (row.task, row.version, shots, row.metric, value, centered, str(row.n or ""), row.note)
