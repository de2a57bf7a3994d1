"""Results of an evaluation: the table's rows, and the files that hold them.

`results.csv` has the table, `results.json` the table with all that it depends on, and `examples/TASK.jsonl` one line an
example.
"""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nmoe.eval.requests import ExampleResult, Metric

FORMAT = 1
"""Of `results.json`."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    task: str
    version: str
    shots: int | None
    """None: a figure of tasks that have different ones."""
    metric: str
    value: float
    stderr: float | None
    centered: float | None
    n: int
    """Examples behind it; of a mean over tasks, the tasks."""
    note: str = ""
    """Such as `partial (14/22)`."""


@dataclass(frozen=True)
class TaskResult:
    """What was measured of one task."""

    task: str
    version: str
    shots: int
    data_sha256: str
    metrics: tuple[Metric, ...]
    examples: tuple[ExampleResult, ...]
    limit: int | None
    """Examples asked for; None: all."""
    seconds: float

    @property
    def n_cropped(self) -> int:
        """Examples whose prompt did not fit."""
        return sum(example.n_cropped > 0 for example in self.examples)

    def rows(self) -> list[Row]:
        """One a metric."""
        return [
            Row(
                self.task, self.version, self.shots, metric.name, metric.value, metric.stderr, metric.centered,
                len(self.examples), f"{self.n_cropped} cropped" if self.n_cropped else "",
            )
            for metric in self.metrics
        ]  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What `evaluate` gives, the same on every rank."""

    tasks: tuple[TaskResult, ...]
    summaries: tuple[Row, ...] = ()
    """Figures of several tasks together, such as CORE."""
    model: str = ""
    """What was measured, in the caller's words."""
    tokenizer: str = ""
    """Name and fingerprint."""
    warnings: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    """Whatever else the caller wants to keep with them; values of JSON."""

    def rows(self) -> list[Row]:
        """The table: each task's rows, and then the summaries."""
        return [row for task in self.tasks for row in task.rows()] + list(self.summaries)

    def tags(self) -> dict[str, float]:
        """As metrics of a run: `eval/<task>/<metric>`."""
        return {f"eval/{row.task}/{row.metric}": row.value for row in self.rows()}

    def write(self, folder: Path) -> list[Path]:
        """Writes all files anew, each at once and whole; returns their paths. On several ranks, one calls it."""
        table = [asdict(row) for row in self.rows()]
        document = {
            "format": FORMAT,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "rows": table,
            "tasks": [
                {
                    "task": task.task,
                    "version": task.version,
                    "shots": task.shots,
                    "data_sha256": task.data_sha256,
                    "limit": task.limit,
                    "n_examples": len(task.examples),
                    "n_cropped": task.n_cropped,
                    "seconds": round(task.seconds, 3),
                }
                for task in self.tasks
            ],
            "warnings": list(self.warnings),
            "about": self.about,
        }
        (folder / "examples").mkdir(parents=True, exist_ok=True)
        written = [folder / "results.csv", folder / "results.json"]
        _write_csv(written[0], table)
        _write(written[1], json.dumps(_finite(document), indent=2, ensure_ascii=False) + "\n")
        for task in self.tasks:
            path = folder / "examples" / f"{task.task.replace('/', '.')}.jsonl"
            lines = [json.dumps(_finite(asdict(example)), ensure_ascii=False) for example in task.examples]
            _write(path, "".join(line + "\n" for line in lines))
            written.append(path)
        return written


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error from the sample's own spread; None of a single value.

    Raises:
        ValueError: there are no values.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def centered(value: float, baseline: float) -> float:
    """0 at the baseline of guessing, 1 at perfection; both as shares of 1."""
    return (value - baseline) / (1.0 - baseline)


def _write_csv(path: Path, table: list[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    os.replace(partial, path)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    # A lone surrogate, which JSON data may hold and UTF-8 cannot, is kept as JSON spells it.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
