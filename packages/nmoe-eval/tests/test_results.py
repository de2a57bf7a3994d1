"""What is written to disk can be read back, and says all that a figure depends on."""

import csv
import json
import math
import statistics

import pytest
from nmoe.eval.requests import ExampleResult, Metric
from nmoe.eval.results import Results, Row, TaskResult, centered, mean_and_stderr


def example(number, correct, n_cropped=0, score=-1.5):
    return ExampleResult(
        id=str(number), prompt="Wer? \ud83d\x00\n", choices=("a", "é"), scores=(score, -2.0), pick=0, gold=1,
        correct=correct, values={"acc_norm": 1.0}, n_cropped=n_cropped,
    )  # fmt: skip


@pytest.fixture
def results():
    task = TaskResult(
        "core/wino", "1", 3, "ab" * 32, (Metric("acc", 0.5, 0.25, 0.0), Metric("acc_norm", 1.0)),
        (example(1, 1.0), example(2, 0.0, n_cropped=4, score=math.nan)), 2, 1.23456,
    )  # fmt: skip
    summary = Row("core", "1", None, "centered", 0.125, None, 0.125, 1, "partial (1/22)")
    return Results((task,), (summary,), model="run@5", tokenizer="words 00", warnings=("a",), about={"device": "cpu"})


def test_the_table_has_a_row_a_metric_and_the_summaries(results):
    rows = results.rows()
    assert [(row.task, row.metric, row.value) for row in rows] == [
        ("core/wino", "acc", 0.5), ("core/wino", "acc_norm", 1.0), ("core", "centered", 0.125)
    ]  # fmt: skip
    assert rows[0].note == "1 cropped"
    assert rows[0].n == 2
    assert results.tags() == {
        "eval/core/wino/acc": 0.5, "eval/core/wino/acc_norm": 1.0, "eval/core/centered": 0.125
    }  # fmt: skip


def test_files_hold_the_table_and_every_example(results, tmp_path):
    written = results.write(tmp_path / "out")
    assert written == [tmp_path / "out" / name for name in ("results.csv", "results.json", "examples/core.wino.jsonl")]
    with open(written[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["0.5", "1.0", "0.125"]
    assert rows[2]["shots"] == ""
    assert rows[2]["note"] == "partial (1/22)"
    document = json.loads(written[1].read_text())
    assert document["model"] == "run@5"
    assert document["about"] == {"device": "cpu"}
    assert document["rows"][0]["centered"] == 0.0
    (task,) = document["tasks"]
    assert (task["data_sha256"], task["version"], task["limit"], task["n_cropped"]) == ("ab" * 32, "1", 2, 1)
    lines = [json.loads(line) for line in written[2].read_text().splitlines()]
    assert [line["correct"] for line in lines] == [1.0, 0.0]
    assert lines[0]["choices"] == ["a", "é"]
    assert lines[0]["scores"] == [-1.5, -2.0]
    assert lines[1]["scores"] == [None, -2.0], "JSON knows no NaN"
    assert lines[0]["prompt"].startswith("Wer? ")
    assert not list(tmp_path.rglob("*.partial"))
    assert results.write(tmp_path / "out") == written, "a second time too"


def test_mean_and_its_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(0.6)
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_and_stderr([1.0]) == (1.0, None)
    assert centered(0.25, 0.25) == 0.0
    assert centered(1.0, 0.25) == 1.0
    assert centered(0.0, 0.25) == pytest.approx(-1 / 3)
