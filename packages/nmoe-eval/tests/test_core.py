"""CORE against its definition, written out plainly: one forward call a prompt, whole logits, no sharing."""

import csv
import json
import math
import random

import pytest
import torch
from nmoe.eval.core import CoreTask, core_row, load_core
from nmoe.eval.errors import MissingDataError, TaskDataError, UnknownTaskError
from nmoe.eval.requests import ExampleResult, Metric
from nmoe.eval.results import TaskResult
from nmoe.eval.runner import evaluate
from nmoe.eval.sources import Sources

VOCAB = 211
WORDS = ("the", "a", "red", "blue", "dog", "cat", "runs", "sleeps", "house", "tree", "and", "or", "not", "seven")


def sentence(rng, low=2, high=7):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def questions(rng, n, choices=4):
    found = []
    for _ in range(n):
        texts = [sentence(rng, 1, 4) + f" {letter}." for letter in "wxyz"[:choices]]
        found.append({"query": f"Question: {sentence(rng)}?", "choices": texts, "gold": rng.randrange(choices)})
    return found


def schemas(rng, n):
    found = []
    for _ in range(n):
        begin = sentence(rng)
        options = [f"{begin} {each}" for each in rng.sample(WORDS, 2)]
        found.append({"context_options": options, "continuation": sentence(rng, 1, 3), "gold": rng.randrange(2)})
    return found


def texts(rng, n):
    return [{"context": f" {sentence(rng)} ", "continuation": sentence(rng, 1, 2)} for _ in range(n)]


TASKS = [
    {"label": "asked", "dataset_uri": "a/asked.jsonl", "num_fewshot": [3], "icl_task_type": "multiple_choice",
     "continuation_delimiter": "\nAnswer: "},
    {"label": "asked_bare", "dataset_uri": "a/asked.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"},
    {"label": "wino", "dataset_uri": "b/wino.jsonl", "num_fewshot": [0], "icl_task_type": "schema"},
    {"label": "wino_shots", "dataset_uri": "b/wino.jsonl", "num_fewshot": [2], "icl_task_type": "schema"},
    {"label": "lines", "dataset_uri": "b/lines.jsonl", "num_fewshot": [2], "icl_task_type": "language_modeling"},
    {"label": "lines_bare", "dataset_uri": "b/lines.jsonl", "num_fewshot": [0], "icl_task_type": "language_modeling",
     "continuation_delimiter": "\nAnswer: "},
]  # fmt: skip
BASELINES = {"asked": 25, "asked_bare": 25, "wino": 50, "wino_shots": 50, "lines": 0, "lines_bare": 0, "other": 33.3}


@pytest.fixture
def bundle(tmp_path, write_jsonl):
    rng = random.Random(5)
    data = tmp_path / "eval_data"
    rows = questions(rng, 23)
    rows[3]["choices"][1] = rows[3]["choices"][2] + " longer"  # one choice begins with all of another
    rows[4]["choices"] = rows[4]["choices"][:1] * 4
    write_jsonl(data / "a" / "asked.jsonl", rows)
    write_jsonl(data / "b" / "wino.jsonl", schemas(rng, 17))
    write_jsonl(data / "b" / "lines.jsonl", texts(rng, 19))
    write_core(tmp_path, TASKS)
    return tmp_path


def write_core(folder, tasks):
    # Every YAML reader reads JSON.
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        rows.writerows([label, "world, and more", percent, "x\ny"] for label, percent in BASELINES.items())


class Plain:
    """The definition, example by example."""

    def __init__(self, model, tokenizer, folder, max_length=None):
        self.model, self.tokenizer, self.folder, self.max_length = model, tokenizer, folder, max_length

    def losses(self, tokens):
        """Of tokens 1 and on, and whether each is the likeliest."""
        with torch.no_grad():
            logits = self.model.logits(torch.tensor([tokens]))[0, :-1]
        target = torch.tensor(tokens[1:])
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return loss.tolist(), (logits.argmax(-1) == target).tolist()

    def data(self, task, limit):
        lines = (self.folder / "eval_data" / task["dataset_uri"]).read_text().splitlines()
        data = [json.loads(line) | {"line": number} for number, line in enumerate(lines, 1)]
        random.Random(1337).shuffle(data)
        return data if limit is None else data[:limit]

    def run(self, task, limit=None):
        """[(line, scores, pick, correct)]"""
        data, delimiter = self.data(task, limit), task.get("continuation_delimiter", " ")
        found = []
        for index, item in enumerate(data):
            rng = random.Random(1234 + index)
            others = [i for i in range(len(data)) if i != index]
            shots = [data[i] for i in rng.sample(others, task["num_fewshot"][0])]
            kind = task["icl_task_type"]
            if kind == "multiple_choice":
                head = "".join(s["query"] + delimiter + s["choices"][s["gold"]] + "\n\n" for s in shots)
                prompts = [head + item["query"] + delimiter + choice for choice in item["choices"]]
            elif kind == "schema":
                head = "".join(s["context_options"][s["gold"]] + delimiter + s["continuation"] + "\n\n" for s in shots)
                prompts = [head + option + delimiter + item["continuation"] for option in item["context_options"]]
            else:
                head = "".join(s["context"].strip() + delimiter + s["continuation"] + "\n\n" for s in shots)
                base = head + item["context"].strip() + delimiter
                prompts = [base.strip(), base + item["continuation"]]
            tokens = [[self.tokenizer.eos_id, *self.tokenizer.encode(prompt)] for prompt in prompts]
            if kind == "language_modeling":
                without, whole = tokens
                assert whole[: len(without)] == without
                whole, start = self.crop(whole, len(without))
                loss, greedy = self.losses(whole)
                right = all(greedy[start - 1 :])
                found.append((item["line"], [-sum(loss[start - 1 :])], 0 if right else None, right))
                continue
            same = 0
            if kind == "multiple_choice":
                while all(same < len(t) and t[same] == tokens[0][same] for t in tokens):
                    same += 1
                starts = [same] * len(tokens)
            else:
                while all(same < len(t) and t[-same - 1] == tokens[0][-same - 1] for t in tokens):
                    same += 1
                starts = [len(t) - same for t in tokens]
            means = []
            for each, start in zip(tokens, starts, strict=True):
                cropped, first = self.crop(each, start)
                loss = self.losses(cropped)[0][first - 1 :]
                means.append(sum(loss) / len(loss) if loss else math.nan)
            pick = means.index(min(means))
            found.append((item["line"], [-mean for mean in means], pick, pick == item["gold"]))
        return found

    def crop(self, tokens, start):
        over = max(0, len(tokens) - (self.max_length or len(tokens)))
        return tokens[over:], start - over


def same_numbers(result, expected):
    assert [int(example.id) for example in result.examples] == [line for line, *_ in expected]
    for example, (_, scores, pick, correct) in zip(result.examples, expected, strict=True):
        assert list(example.scores) == pytest.approx(scores, rel=1e-9, nan_ok=True)
        assert (example.pick, bool(example.correct)) == (pick, correct)


@pytest.fixture(scope="module")
def model(small_model):
    return small_model(VOCAB)


@pytest.mark.parametrize("limit", [None, 7])
@pytest.mark.parametrize("max_tokens", [80, 3000])
def test_every_example_has_the_numbers_of_the_definition(model, words, bundle, limit, max_tokens):
    tokenizer, told = words(VOCAB), []
    found = evaluate(
        model, tokenizer, ["core"], sources=Sources((bundle,)), max_length=80, max_tokens=max_tokens, limit=limit,
        progress=lambda name, done, total: told.append((name, done == total)),
    )  # fmt: skip
    plain = Plain(model, tokenizer, bundle, 80)
    centered = []
    for task, result in zip(TASKS, found.tasks, strict=True):
        assert result.task == f"core/{task['label']}"
        expected = plain.run(task, limit)
        same_numbers(result, expected)
        accuracy = sum(correct for *_, correct in expected) / len(expected)
        baseline = BASELINES[task["label"]] / 100
        centered.append((accuracy - baseline) / (1 - baseline))
        (metric,) = result.metrics
        assert (metric.value, metric.centered) == pytest.approx((accuracy, centered[-1]))
        assert metric.stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(expected) - 1)))
        assert (result.task, True) in told
    (core,) = found.summaries
    assert core.value == pytest.approx(sum(centered) / len(centered))
    assert (core.task, core.n, core.note) == ("core", 6, "")
    accuracies = {result.metrics[0].value for result in found.tasks}
    assert len(accuracies) > 2, "models that are always wrong compare well with anything"


def test_a_model_that_knows_the_text_is_right(words, bundle, small_model):
    """Language modelling: each token of the continuation must be the likeliest; here the model is made to know them."""
    tokenizer = words(VOCAB)
    model = small_model(VOCAB, n_layers=1, n_dense_layers=1)
    task = load_core(Sources((bundle,)), "lines_bare").tasks[0]
    with torch.no_grad():  # each token predicts what follows it in the first example
        example = task.examples(tokenizer, limit=1, max_length=100)[0].requests[0]
        tokens = [*example.context, *example.continuation]
        for layer in model.layers:
            layer.attn.wo.weight.zero_()
            layer.ffn.w2.zero_()
        model.embed.weight.zero_()
        model.head.weight.zero_()
        for place, (token, following) in enumerate(zip(tokens[-4:-1], tokens[-3:], strict=True)):
            model.embed.weight[token, place] = 1
            model.head.weight[following, place] = 5
    found = evaluate(model, tokenizer, ["core/lines_bare"], sources=Sources((bundle,)), max_length=99, max_tokens=99,
                     limit=1)  # fmt: skip
    assert len(example.continuation) <= 3
    assert found.tasks[0].examples[0].correct == 1.0


def test_longer_prompts_are_cropped_from_the_left_counted_and_reported(model, words, bundle):
    tokenizer = words(VOCAB)
    found = evaluate(model, tokenizer, ["core/asked"], sources=Sources((bundle,)), max_length=24, max_tokens=96)
    (result,) = found.tasks
    same_numbers(result, Plain(model, tokenizer, bundle, 24).run(TASKS[0]))
    assert result.n_cropped == sum(example.n_cropped > 0 for example in result.examples) > 10
    assert any(f"{result.n_cropped} of 23 prompts were longer" in warning for warning in found.warnings)
    assert result.rows()[0].note == f"{result.n_cropped} cropped"
    with pytest.raises(TaskDataError, match=r"asked.jsonl, line \d+: expected \d+ tokens to predict .* the 3 "):
        evaluate(model, tokenizer, ["core/asked"], sources=Sources((bundle,)), max_length=3, max_tokens=96)


class Characters:
    """No token joins a space to a word: the space before a continuation is a token that is predicted too."""

    name, fingerprint, eos_id = "characters", "1" * 64, VOCAB - 1

    def encode(self, text):
        return [ord(each) % self.eos_id for each in text]


def test_white_space_before_a_continuation_belongs_to_it(model, bundle):
    for task in TASKS[-2:]:
        found = evaluate(model, Characters(), [f"core/{task['label']}"], sources=Sources((bundle,)), max_length=400,
                         max_tokens=4000, limit=5)  # fmt: skip
        same_numbers(found.tasks[0], Plain(model, Characters(), bundle).run(task, 5))


def test_few_examples_still_have_their_shots(model, words, bundle):
    """A limit of one has others to draw its examples from, where the definition would have none."""
    found = evaluate(
        model, words(VOCAB), ["core/asked"], sources=Sources((bundle,)), max_length=99, max_tokens=99, limit=1
    )
    (example,) = found.tasks[0].examples
    assert example.prompt.count("\nAnswer: ") == 4


def test_missing_data_is_listed_with_where_it_was_looked_for(model, words, bundle):
    (bundle / "eval_data" / "b" / "wino.jsonl").unlink()
    with pytest.raises(MissingDataError) as caught:
        load_core(Sources((bundle,)))
    told = str(caught.value)
    for label in ("wino", "wino_shots"):
        assert f"  {label}: {bundle / 'eval_data' / 'b' / 'wino.jsonl'}" in told
    assert "lines" not in told
    assert "found that of 4" in told
    assert "--allow-missing" in told
    found = evaluate(model, words(VOCAB), ["core"], sources=Sources((bundle,), allow_missing=True), max_length=80,
                     max_tokens=800)  # fmt: skip
    assert found.summaries[0].note == "partial (4/6)"
    assert found.summaries[0].n == 4
    with pytest.raises(MissingDataError, match=r"looked for .*core.yaml"):
        load_core(Sources((bundle / "eval_data",)))
    with pytest.raises(MissingDataError, match="no folder"):
        load_core(Sources())


def test_nothing_at_all_is_an_error_even_if_some_may_be_missing(tmp_path):
    write_core(tmp_path, TASKS)
    with pytest.raises(MissingDataError, match="found that of 0"):
        load_core(Sources((tmp_path,), allow_missing=True))


def test_a_task_that_nobody_has_seen_works_from_its_files_alone(model, words, tmp_path, write_jsonl):
    task = {"label": "other", "dataset_uri": "new/other.jsonl", "num_fewshot": [1], "icl_task_type": "multiple_choice"}
    write_jsonl(tmp_path / "eval_data/new/other.jsonl", questions(random.Random(1), 6, choices=3))
    write_core(tmp_path, [task])
    found = evaluate(model, words(VOCAB), ["core"], sources=Sources((tmp_path,)), max_length=80, max_tokens=800)
    same_numbers(found.tasks[0], Plain(model, words(VOCAB), tmp_path).run(task))
    with pytest.raises(UnknownTaskError, match="CORE's tasks, other; found 'asked'"):
        load_core(Sources((tmp_path,)), "asked")


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("kind", "line", "told"),
    [
        ("multiple_choice", '{"query": ', "does not parse"),
        ("multiple_choice", "", "does not parse"),
        ("multiple_choice", "[1]", "expected a JSON object"),
        ("multiple_choice", GOOD | {"gold": 2}, "from 0 to 1 under 'gold', found 2"),
        ("multiple_choice", GOOD | {"gold": -1}, "from 0 to 1 under 'gold', found -1"),
        ("multiple_choice", GOOD | {"gold": True}, "under 'gold', found True"),
        ("multiple_choice", GOOD | {"choices": ["a"]}, "at least 2 texts under 'choices'"),
        ("multiple_choice", GOOD | {"choices": ["a", " "]}, r"under 'choices\[1\]', found an empty one"),
        ("multiple_choice", GOOD | {"choices": ["a", 3]}, "under 'choices"),
        ("multiple_choice", {"choices": ["a", "b"], "gold": 0}, "a field 'query', found 'choices', 'gold'"),
        ("schema", {"context_options": ["a", "b"], "continuation": "", "gold": 0}, "'continuation', found an empty"),
        ("schema", {"context_options": ["a", "b"], "continuation": "c", "gold": 5}, "under 'gold', found 5"),
        ("language_modeling", {"context": "a", "continuation": "\n"}, "'continuation', found an empty"),
        ("language_modeling", {"context": None, "continuation": "b"}, "text under 'context', found None"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, write_jsonl, kind, line, told):
    fine = {"multiple_choice": GOOD, "schema": schemas(random.Random(0), 1)[0], "language_modeling": GOOD}[kind]
    fine = {"context": "a", "continuation": "b"} if kind == "language_modeling" else fine
    path = write_jsonl(tmp_path / "eval_data/x.jsonl", [fine, fine, line, fine])
    write_core(tmp_path, [{"label": "other", "dataset_uri": "x.jsonl", "num_fewshot": [0], "icl_task_type": kind}])
    with pytest.raises(TaskDataError, match=told) as caught:
        load_core(Sources((tmp_path,)))
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"icl_task_type": "essay"}, "one of multiple_choice"),
        ({"num_fewshot": ["many"]}, "a number of examples"),
        ({"dataset_uri": "../../secret"}, "a path within eval_data"),
        ({"label": "unheard"}, "random baseline of unheard"),
        ({"continuation_delimiter": 3}, "text under 'continuation_delimiter'"),
    ],
)
def test_what_is_wrong_with_the_bundle_is_named(bundle, change, told):
    write_core(bundle, [TASKS[0] | change])
    with pytest.raises(TaskDataError, match=told):
        load_core(Sources((bundle,)))


def test_a_bundle_that_is_no_yaml_or_has_too_few_items(bundle, write_jsonl):
    write_jsonl(bundle / "eval_data/a/asked.jsonl", [GOOD] * 3)
    with pytest.raises(TaskDataError, match="more than 3 items, of which others are examples, found 3"):
        load_core(Sources((bundle,)))
    (bundle / "core.yaml").write_text("icl_tasks:\n  - label: [")
    with pytest.raises(TaskDataError, match=r"core.yaml, line \d: expected YAML"):
        load_core(Sources((bundle,)))


def test_core_is_the_mean_of_centered_accuracies():
    def result(value, stderr, centered):
        blank = ExampleResult("0", "", (), (), 0, 0, 1.0)
        return TaskResult("t", "1", 0, "", (Metric("acc", value, stderr, centered),), (blank,), None, 0.0)

    row = core_row([result(0.5, 0.03, 0.0), result(0.8, 0.04, 0.6)], "partial (2/22)")
    assert row.value == pytest.approx(0.3)
    assert row.stderr == pytest.approx(math.sqrt((0.03 / 0.5) ** 2 + (0.04 / 0.5) ** 2) / 2)
    assert row.note == "partial (2/22)"


def test_the_real_bundle(shared_bundle, words, model):
    """All tasks at hand read without complaint, and have the numbers of the definition."""
    suite = load_core(Sources((shared_bundle,), allow_missing=True))
    kinds = {task.entry.kind for task in suite.tasks}
    assert kinds == {"multiple_choice", "schema", "language_modeling"}
    tokenizer = words(VOCAB)
    plain = Plain(model, tokenizer, shared_bundle, 300)
    for label in ("copa", "winogrande", "bigbench_repeat_copy_logic"):
        task: CoreTask = next(task for task in suite.tasks if task.entry.label == label)
        entry = {
            "dataset_uri": str(task.entry.path.relative_to(shared_bundle / "eval_data")),
            "num_fewshot": [task.shots],
            "icl_task_type": task.entry.kind,
            "continuation_delimiter": task.entry.delimiter,
        }
        found = evaluate(model, tokenizer, [task.name], sources=Sources((shared_bundle,)), max_length=300,
                         max_tokens=3000, limit=12)  # fmt: skip
        same_numbers(found.tasks[0], plain.run(entry, 12))
