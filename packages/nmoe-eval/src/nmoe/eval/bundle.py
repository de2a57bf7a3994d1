"""The files of a CORE evaluation bundle: `core.yaml` names the tasks, `eval_meta_data.csv` their baselines, and
`eval_data/` holds one JSONL file a task."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped]
from nmoe.eval.errors import MissingDataError, TaskDataError

Kind = Literal["multiple_choice", "schema", "language_modeling"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class BundleTask:
    """What the bundle says of one task."""

    label: str
    kind: Kind
    path: Path
    """Of its data."""
    shots: int
    delimiter: str
    """Between a context and its continuation."""
    baseline: float
    """Share of right answers that guessing gives."""


def find_bundle(places: Sequence[Path]) -> Path:
    """The first of the folders that is a bundle.

    Raises:
        MissingDataError: none is, with the places that were looked at.
    """
    for place in places:
        if (place / "core.yaml").is_file():
            return place
    looked = ", ".join(str(place / "core.yaml") for place in places) or "no folder"
    raise MissingDataError(
        f"expected CORE's evaluation bundle, found none; looked for {looked}: name the folder that holds it with --data"
    )


def read_bundle(folder: Path) -> list[BundleTask]:
    """The tasks that the bundle names, whether their data is there or not.

    Raises:
        MissingDataError: the baselines are not there.
        TaskDataError: a file is not as it should be; the message names it.
    """
    path = folder / "core.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise TaskDataError(path, mark.line + 1 if mark else None, f"expected YAML, found: {error}") from error
    entries = document.get("icl_tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise TaskDataError(path, None, "expected a list of tasks under 'icl_tasks'")
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    tasks = [_task(folder, path, entry, baselines) for entry in entries]
    labels = [task.label for task in tasks]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise TaskDataError(path, None, f"expected each label once, found {', '.join(twice)} more than once")
    return tasks


def _task(folder: Path, path: Path, entry: Any, baselines: dict[str, float]) -> BundleTask:
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
        raise TaskDataError(path, None, f"expected a task with a label, found {entry!r}")
    label = entry["label"]

    def wrong(key: str, expected: str) -> TaskDataError:
        return TaskDataError(path, None, f"task {label}: expected {expected} under {key!r}, found {entry.get(key)!r}")

    kind, uri = entry.get("icl_task_type"), entry.get("dataset_uri")
    if kind not in KINDS:
        raise wrong("icl_task_type", f"one of {', '.join(KINDS)}")
    if not isinstance(uri, str) or not uri or Path(uri).is_absolute() or ".." in Path(uri).parts:
        raise wrong("dataset_uri", "a path within eval_data")
    shots = entry.get("num_fewshot")
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise wrong("num_fewshot", "a number of examples")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise wrong("continuation_delimiter", "text")
    if label not in baselines:
        raise TaskDataError(
            folder / "eval_meta_data.csv", None, f"expected a row with the random baseline of {label}, found none"
        )
    return BundleTask(label, KINDS[KINDS.index(kind)], folder / "eval_data" / uri, shots, delimiter, baselines[label])


def _read_baselines(path: Path) -> dict[str, float]:
    """By label, as shares; the file has percents."""
    if not path.is_file():
        raise MissingDataError(f"expected the tasks' random baselines in {path}, found no such file")
    found: dict[str, float] = {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for row in rows:
            label, percent = row.get("Eval Task"), row.get("Random baseline")
            try:
                baseline = float(percent or "") / 100
            except ValueError:
                baseline = -1.0
            if not label or not 0 <= baseline < 1:
                expected = "expected a task under 'Eval Task' and a percentage below 100 under 'Random baseline'"
                raise TaskDataError(path, rows.line_num, f"{expected}, found {label!r} and {percent!r}")
            found[label] = baseline
    return found
