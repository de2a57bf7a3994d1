"""Choice tasks against lm-evaluation-harness: its own templates, with nothing replaced but where the data is."""

import csv
import json
import random

import pytest
import torch
from nmoe.eval.choice import load_choice
from nmoe.eval.choice_tasks import choice_specs
from nmoe.eval.errors import MissingDataError, TaskDataError
from nmoe.eval.runner import evaluate
from nmoe.eval.sources import Sources

VOCAB = 307
WORDS = ("the", "a", "red", "blue", "dog", "cat", "runs", "sleeps", "house", "tree", "and", "or", "não", "日本", "x²")


def say(rng, low=2, high=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def arc(rng, number):
    n = rng.choice([3, 4, 4, 5])
    labels = [str(i + 1) for i in range(n)] if number % 5 == 0 else list("ABCDE"[:n])
    choices = {"text": [say(rng, 1, 4) for _ in range(n)], "label": labels}
    return {"id": str(number), "question": say(rng) + "?", "choices": choices, "answerKey": rng.choice(labels)}


def openbookqa(rng, number):
    choices = {"text": [say(rng, 1, 5) for _ in range(4)], "label": list("ABCD")}
    space = " " if number % 4 == 0 else ""
    return {"id": str(number), "question_stem": say(rng), "choices": choices, "answerKey": space + rng.choice("ABCD")}


def boolq(rng, number):
    return {"passage": say(rng, 9, 20), "question": say(rng), "idx": number, "label": rng.randrange(2)}


def copa(rng, number):
    texts = {key: say(rng).capitalize() + "." for key in ("premise", "choice1", "choice2")}
    return texts | {"question": rng.choice(["cause", "effect"]), "idx": number, "label": rng.randrange(2)}


def hellaswag(rng, number):
    marks = " [title] [step]" if number % 3 == 0 else ""
    return {
        "ind": number, "activity_label": say(rng, 1, 2), "ctx_a": say(rng).capitalize() + "." + marks,
        "ctx_b": "" if number % 4 == 0 else say(rng, 1, 3), "endings": [say(rng) + "  [x] ." for _ in range(4)],
        "label": str(rng.randrange(4)),
    }  # fmt: skip


def winogrande(rng, number):
    sentence = f"{say(rng)} _ {say(rng)}."
    return {"sentence": sentence, "option1": rng.choice(WORDS), "option2": say(rng, 1, 2), "answer": rng.choice("12")}


def mmlu(rng, number):
    return {
        "question": f" {say(rng)}?\n", "subject": "anatomy", "choices": [say(rng, 1, 3) for _ in range(4)],
        "answer": rng.randrange(4),
    }  # fmt: skip


def mmlu_pro(rng, number):
    options = [say(rng, 1, 3) for _ in range(rng.choice([3, 9, 10]))]
    answer = rng.randrange(len(options))
    return {
        "question_id": number, "question": say(rng), "options": options, "answer": "ABCDEFGHIJ"[answer],
        "answer_index": answer, "cot_content": "", "category": "law", "src": "x",
    }  # fmt: skip


MADE = {
    "arc_easy": ("allenai/ai2_arc/ARC-Easy", arc),
    "arc_challenge": ("ai2_arc/ARC-Challenge", arc),  # a copy without its owner's folder
    "openbookqa": ("allenai/openbookqa/main", openbookqa),
    "boolq": ("aps/super_glue/boolq", boolq),
    "copa": ("aps/super_glue/copa", copa),
    "hellaswag": ("Rowan/hellaswag", hellaswag),
    "winogrande": ("allenai/winogrande/winogrande_xl", winogrande),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", mmlu_pro),
}
SUBJECTS = ("anatomy", "high_school_us_history")
HAS_TEST = ("arc_easy", "arc_challenge", "openbookqa", "mmlu_pro")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A local copy of every task's splits, a few items each."""
    folder = tmp_path_factory.mktemp("data")

    def write(place, split, make, n):
        rng = random.Random(f"{place}/{split}")
        path = folder / place / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(make(rng, number)) + "\n" for number in range(n)))

    for name, (place, make) in MADE.items():
        write(place, "test" if name in HAS_TEST else "validation", make, 24)
        write(place, "validation" if name == "mmlu_pro" else "train", make, 12)
    for subject in SUBJECTS:
        write(f"cais/mmlu/{subject}", "test", mmlu, 15)
        write(f"cais/mmlu/{subject}", "dev", mmlu, 6)
    return folder


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(VOCAB, torch.float32)


@pytest.fixture(scope="module")
def templates():
    """The harness's index of its own tasks; reading it takes seconds."""
    pytest.importorskip("lm_eval", reason="needs lm-eval, in this package's extra [test]")
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def harness(model, words, templates, monkeypatch, tmp_path):
    """`harness(task, shots, place, splits)`: what the harness makes of its task, one forward call a request."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM

    class Harnessed(TemplateLM):
        tokenizer_name = "words"

        def __init__(self):
            super().__init__()
            self.words = words(VOCAB)

        @property
        def eot_token_id(self):
            return self.words.eos_id

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return self.words.encode(string)

        def _loglikelihood_tokens(self, requests, **kwargs):
            found = []
            for _, context, continuation in requests:
                tokens = torch.tensor([[*context, *continuation][:-1]])
                with torch.no_grad():
                    logits = model.logits(tokens)[0, -len(continuation) :]
                target = torch.tensor(continuation)
                logprob = logits.log_softmax(-1)[range(len(target)), target].sum().item()
                found.append((logprob, bool((logits.argmax(-1) == target).all())))
            return found

        def loglikelihood_rolling(self, requests, **kwargs):
            raise NotImplementedError

        def generate_until(self, requests, **kwargs):
            raise NotImplementedError

    def run(task, shots, place, splits):
        replaced = {
            "include": str(templates.task_index[task].yaml_path),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(place / f"{split}.jsonl") for split in splits},
                "cache_dir": str(tmp_path / task),
            },
        }
        path = tmp_path / f"{task}.yaml"
        path.write_text(json.dumps(replaced))  # every YAML reader reads JSON
        found = simple_evaluate(
            Harnessed(), tasks=[str(path)], num_fewshot=shots, log_samples=True, bootstrap_iters=2,
            task_manager=templates,
        )  # fmt: skip
        return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

    return run


def ours(model, words, data, name, **options):
    sources = Sources((data,), hub=False, **options)
    return evaluate(model, words(VOCAB), [name], sources=sources, max_length=900, max_tokens=4000).tasks[0]


def same(result, figures, samples):
    assert len(result) == len(samples)
    for example, sample in zip(result, samples, strict=True):
        expected = [float(logprob) for ((logprob, _),) in sample["resps"]]
        assert list(example.scores) == pytest.approx(expected, abs=1e-4)
        assert example.correct == sample["acc"]
        if "acc_norm" in sample:
            assert example.values["acc_norm"] == sample["acc_norm"]
    assert sum(example.correct for example in result) / len(result) == pytest.approx(figures["acc,none"], abs=1e-12)


@pytest.mark.parametrize("shots", [None, 2])
@pytest.mark.parametrize("name", list(MADE))
def test_the_harness_has_the_same_numbers(model, words, data, harness, name, shots):
    place, _ = MADE[name]
    splits = ["test" if name in HAS_TEST else "validation", "validation" if name == "mmlu_pro" else "train"]
    figures, samples = harness(choice_specs()[name].harness, shots, data / place, splits)
    result = ours(model, words, data, name if shots is None else f"{name}:{shots}")
    same(result.examples, figures, samples)
    metrics = {metric.name: metric for metric in result.metrics}
    assert metrics["acc"].value == pytest.approx(figures["acc,none"], abs=1e-12)
    assert metrics["acc"].stderr == pytest.approx(figures["acc_stderr,none"], rel=1e-9)
    if "acc_norm,none" in figures:
        assert metrics["acc_norm"].value == pytest.approx(figures["acc_norm,none"], abs=1e-12)
    assert 0 < metrics["acc"].value < 1


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_has_the_harness_numbers_subject_by_subject(model, words, data, harness, shots):
    result = ours(model, words, data, f"mmlu:{shots}", allow_missing=True)
    assert result.version == "1 partial (2/57)"
    for subject in SUBJECTS:
        figures, samples = harness(f"mmlu_{subject}", shots, data / "cais/mmlu" / subject, ["test", "dev"])
        same([example for example in result.examples if example.group == subject], figures, samples)
    assert len({example.id for example in result.examples}) == 30


def test_subjects_that_are_missing_are_told(data):
    with pytest.raises(MissingDataError, match=r"abstract_algebra.*54 more of 57.*--allow-missing"):
        load_choice(choice_specs()["mmlu"], Sources((data,), hub=False))
    with pytest.raises(MissingDataError, match="no folder"):
        load_choice(choice_specs()["boolq"], Sources(hub=False))


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """And not for each of MMLU's 57 subjects, at half a minute of retries each."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(MissingDataError, match=r"task mmlu: .* no route to host: name the folder of a local copy"):
        load_choice(choice_specs()["mmlu"], Sources(hub=True))
    assert len(asked) == 1


BROKEN = {
    "arc_easy": (arc, {"answerKey": "Z"}, "one of the labels"),
    "openbookqa": (openbookqa, {"choices": {"text": ["a", "b"], "label": ["A"]}}, "expected at least 2"),
    "boolq": (boolq, {"label": 2}, "from 0 to 1 under 'label', found 2"),
    "copa": (copa, {"question": "why"}, "'cause' or 'effect'"),
    "hellaswag": (hellaswag, {"label": "4"}, "from 0 to 3 under 'label', found '4'"),
    "winogrande": (winogrande, {"sentence": "no blank"}, "a blank '_'"),
    "mmlu_pro": (mmlu_pro, {"answer": "J", "options": ["a", "b"]}, "one of the labels A, B"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_with_file_and_line(words, tmp_path, write_jsonl, name):
    make, change, told = BROKEN[name]
    rng = random.Random(0)
    spec = choice_specs()[name]
    rows = [make(rng, number) for number in range(9)]
    folder = tmp_path / spec.dataset / (spec.configs[0] or "")
    path = write_jsonl(folder / f"{spec.split}.jsonl", [*rows[:5], rows[5] | change, *rows[6:]])
    write_jsonl(folder / f"{spec.shots_split}.jsonl", rows)
    (task,) = load_choice(spec, Sources((tmp_path,), hub=False)).tasks
    with pytest.raises(TaskDataError, match=told) as caught:
        task.examples(words(VOCAB), limit=None, max_length=500)
    assert str(caught.value).startswith(f"{path}, line 6: ")


def test_parquet_and_csv_and_parts_are_read_alike(data, model, words, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    place, _ = MADE["winogrande"]
    rows = [json.loads(line) for line in (data / place / "validation.jsonl").read_text().splitlines()]
    expected = ours(model, words, data, "winogrande").examples
    parts = tmp_path / "parts" / "winogrande" / "winogrande_xl"
    parts.mkdir(parents=True)
    for number, part in enumerate((rows[:9], rows[9:])):
        parquet.write_table(pa.Table.from_pylist(part), parts / f"validation-0000{number}-of-00002.parquet")
    assert [e.scores for e in ours(model, words, tmp_path / "parts", "winogrande").examples] == [
        e.scores for e in expected
    ]
    as_csv = tmp_path / "csv" / "winogrande" / "winogrande_xl"
    as_csv.mkdir(parents=True)
    with open(as_csv / "validation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert [e.scores for e in ours(model, words, tmp_path / "csv", "winogrande").examples] == [
        e.scores for e in expected
    ]
    (parts / "validation-00000-of-00002.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(TaskDataError, match="expected parquet"):
        ours(model, words, tmp_path / "parts", "winogrande")
