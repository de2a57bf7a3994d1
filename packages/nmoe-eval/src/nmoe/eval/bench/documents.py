"""A bundle's items, as the datasets have them that they were taken from: so that tasks of those datasets can be run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmoe.eval.bundle import read_bundle
from nmoe.eval.items import Item, read_jsonl

Row = dict[str, Any]
_OTHERS = 64


def _arc(item: Item) -> Row:
    choices = item.texts("choices")
    labels = "ABCDE"[: len(choices)]
    question = item.text("query").removeprefix("Question: ")
    return {
        "id": str(item.line), "question": question, "choices": {"text": choices, "label": list(labels)},
        "answerKey": labels[item.index("gold", len(choices))],
    }  # fmt: skip


def _boolq(item: Item) -> Row:
    passage, _, question = item.text("query").removeprefix("Passage: ").rpartition("\nQuestion: ")
    label = item.index("gold", 2)  # "no" is the first choice there too
    return {"passage": passage, "question": question.removesuffix("?"), "idx": item.line, "label": label}


def _copa(item: Item) -> Row:
    premise, _, connector = item.text("query").rpartition(", ")
    choices = item.texts("choices")
    return {
        "premise": f"{premise}.", "choice1": choices[0], "choice2": choices[1], "idx": item.line,
        "question": {"because": "cause", "therefore": "effect"}[connector], "label": item.index("gold", 2),
    }  # fmt: skip


def _winogrande(item: Item) -> Row:
    first, second = item.texts("context_options")
    border = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    begin = first[: first.rfind(" ", 0, border) + 1]
    return {
        "sentence": f"{begin}_ {item.text('continuation')}", "option1": first[len(begin) :],
        "option2": second[len(begin) :], "answer": str(item.index("gold", 2) + 1),
    }  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Where a task's splits are looked for, and how the bundle's items become its rows."""

    place: str
    split: str
    """That is evaluated."""
    shots_split: str
    row: Callable[[Item], Row]


DATASETS = {
    "arc_easy": Dataset("allenai/ai2_arc/ARC-Easy", "test", "train", _arc),
    "boolq": Dataset("aps/super_glue/boolq", "validation", "train", _boolq),
    "copa": Dataset("aps/super_glue/copa", "validation", "train", _copa),
    "winogrande": Dataset("allenai/winogrande/winogrande_xl", "validation", "train", _winogrande),
}
"""By the name of the task and of the bundle's."""


def write_documents(bundle: Path, folder: Path, limit: int) -> list[str]:
    """Writes splits of the tasks whose data the bundle holds: `limit` items to be evaluated, and 64 others to draw
    examples from; where there are too few for both, a quarter of all are the others.

    Returns:
        The tasks' names.
    """
    found = []
    for entry in read_bundle(bundle):
        if entry.label not in DATASETS or not entry.path.is_file():
            continue
        dataset = DATASETS[entry.label]
        rows = [dataset.row(item) for item in read_jsonl(entry.path)[0]]
        border = min(limit, len(rows) * 3 // 4)
        place = folder / dataset.place
        place.mkdir(parents=True)
        _write(place / f"{dataset.split}.jsonl", rows[:border])
        _write(place / f"{dataset.shots_split}.jsonl", rows[border : border + _OTHERS])
        found.append(entry.label)
    return found


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
