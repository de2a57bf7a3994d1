"""The benches, with a toy model: what they compare agrees, and their files name no folder."""

import json
import random

import pytest

pytest.importorskip("nmoe.data", reason="benches take tokenizers from nmoe-data")

from nmoe.eval.bench.__main__ import main as bench
from nmoe.eval.bench.documents import write_documents
from nmoe.eval.choice import load_choice
from nmoe.eval.choice_tasks import choice_specs
from nmoe.eval.requests import Score
from nmoe.eval.sources import Sources

SCORE = Score(-1.0, greedy=False, n_tokens=1)
KINDS = {
    "arc_easy": ("multiple_choice", 2),
    "boolq": ("multiple_choice", 1),
    "copa": ("multiple_choice", 0),
    "winogrande": ("schema", 0),
    "lines": ("language_modeling", 1),
}
NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")


def rows(label, n=12):
    rng = random.Random(label)
    for number in range(n):
        one, two = rng.sample(NAMES, 2)
        gold = number % 2
        yield {
            "arc_easy": {"query": f"Question: Who saw {one}?", "choices": [one, two, "no one", "all"], "gold": gold},
            "boolq": {
                "query": f"Passage: {one} is old.\nQuestion: Why?\nQuestion: is {two} old?",
                "choices": ["no", "yes"], "gold": gold,
            },
            "copa": {
                "query": f"{one}, who fell, hurt {two}, {('because', 'therefore')[gold]}",
                "choices": ["it rained.", "it broke."], "gold": gold,
            },
            "winogrande": {
                "context_options": [f"{one} paid {two} as {one}", f"{one} paid {two} as {two}"],
                "continuation": "lost.", "gold": gold,
            },
            "lines": {"context": f"{one} met", "continuation": two},
        }[label]  # fmt: skip


@pytest.fixture
def bundle(tmp_path, write_jsonl):
    folder = tmp_path / "bundle"
    tasks = [
        {"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        for label, (kind, shots) in KINDS.items()
    ]
    for label in KINDS:
        write_jsonl(folder / "eval_data" / f"{label}.jsonl", rows(label))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    baselines = "".join(f"{label},25\n" for label in KINDS)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines)
    return folder


def toy(bundle, *options):
    return [str(bundle), "--toy", "--tokenizer", "byte", "--vocab", "300", "--max-length", "256",
            "--max-tokens", "1024", *map(str, options)]  # fmt: skip


def test_the_engine_and_one_example_at_a_time_agree(bundle, tmp_path):
    output = tmp_path / "result.json"
    assert bench(toy(bundle, "--limit", 9, "--one-by-one", 4, "--other-vocab", 400, "--output", output)) == 0
    result = json.loads(output.read_text())
    assert set(result["tasks"]) == {f"core/{label}" for label in KINDS}
    for task in result["tasks"].values():
        assert (task["examples"], task["one_by_one_examples"]) == (9, 4)
        assert task["nats_a_token_apart_most"] < 1e-4
        assert task["same_likeliest"] == 1
    assert result["total"]["ratio"] > 0
    assert set(result["engine_peak_bytes_by_vocabulary"]) == {"300", "400"}
    assert "--one-by-one 4" in result["command"]
    assert str(tmp_path) not in output.read_text()


def test_items_become_documents_of_their_datasets(bundle, tmp_path, words):
    """As the tasks word them, they read as in the bundle."""
    assert write_documents(bundle, tmp_path / "data", 200) == ["arc_easy", "boolq", "copa", "winogrande"]
    for label, form in {
        "arc_easy": lambda row: (row["query"] + "\nAnswer:", row["choices"][row["gold"]]),
        "boolq": lambda row: (row["query"].removeprefix("Passage: ") + "\nAnswer:", ["no", "yes"][row["gold"]]),
        "copa": lambda row: (row["query"].replace(", b", " b").replace(", t", " t"), row["choices"][row["gold"]]),
        "winogrande": lambda row: (row["context_options"][row["gold"]], row["context_options"][row["gold"]]),
    }.items():
        (task,) = load_choice(choice_specs()[label], Sources((tmp_path / "data",), hub=False), 2).tasks
        examples = task.examples(words(500), limit=None, max_length=200)
        assert len(examples) == 9, "a quarter is kept to draw examples from"
        for example, row in zip(examples, rows(label), strict=False):
            judged = example.judge([SCORE] * len(example.requests))
            prompt, right = form(row)
            assert judged.prompt.endswith(prompt)
            assert judged.choices[judged.gold].strip() == right


def test_lm_evaluation_harness_has_the_same_numbers(bundle, tmp_path, monkeypatch):
    for name in ("lm_eval", "transformers", "accelerate"):
        pytest.importorskip(name)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from nmoe.eval.bench.peer import main as peer

    output = tmp_path / "result.json"
    tasks = ["arc_easy", "boolq:2", "copa", "winogrande"]
    assert peer(toy(bundle, "--tasks", *tasks, "--batches", 2, 5, "--limit", 6, "--output", output)) == 0
    result = json.loads(output.read_text())
    assert list(result["tasks"]) == tasks
    for task in result["tasks"].values():
        assert task["documents"] == 6
        assert task["nats_apart_most"] < 1e-4
        assert (task["same_pick"], task["accuracy"]) == (1, task["harness_accuracy"])
        assert set(task["harness_batches"]) == {"2", "5"}
    assert str(tmp_path) not in output.read_text()
