"""GSM8K, HumanEval and GPQA: prompts, what is read from texts, and figures, against definitions and references."""

import gzip
import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from nmoe.eval.datasets_local import Split
from nmoe.eval.errors import MissingDataError, SandboxUnavailableError, TaskDataError
from nmoe.eval.generation_tasks import (
    HumanEval,
    choice_letter,
    gsm8k_answer,
    load_gpqa,
    load_gsm8k,
    load_humaneval,
    pass_at_k,
)
from nmoe.eval.items import read_jsonl
from nmoe.eval.requests import Text
from nmoe.eval.sandbox import Limits, Sandbox
from nmoe.eval.sources import Sources

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "eval_bundle"


class Bytes:
    name, eos_id, n_vocab, fingerprint = "bytes", 256, 257, "f"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


def text(words):
    return Text(words, len(words), "stop")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Sources((path.parent,), hub=False)


def split_of(rows, folder):
    write(folder / "x.jsonl", rows)
    items, digest = read_jsonl(folder / "x.jsonl")
    return Split(tuple(items), digest)


def only(suite):
    (task,) = suite.tasks
    return task


def questions(count, word="q"):
    return [{"question": f"{word}{i}?", "answer": f"so {i}\n#### {1000 + i:,}"} for i in range(count)]


# ---- GSM8K ---------------------------------------------------------------------------------------------------------


def test_gsm8k_prompts_have_examples_of_the_training_set(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", questions(9, "t"))
    task = only(load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", questions(4)), shots=2))
    examples = task.examples(Bytes(), limit=3, max_length=2048)
    assert [example.id for example in examples] == ["0", "1", "2"]
    rng = random.Random(1234)
    for number, example in enumerate(examples):
        first, second = rng.sample(questions(9, "t"), 2)
        expected = "".join(f"Question: {each['question']}\nAnswer: {each['answer']}\n\n" for each in (first, second))
        expected += f"Question: q{number}?\nAnswer:"
        (request,) = example.requests
        assert Bytes().decode(request.prompt) == expected
        assert (request.stops, request.max_new) == (("Question:", "</s>", "<|im_end|>"), 256)
        assert (request.temperature, request.n) == (0.0, 1)
    assert (task.version, task.shots) == ("3.0", 2)


def test_gsm8k_without_a_training_set_never_shows_the_question_itself(tmp_path):
    task = only(load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", questions(7)), shots=5))
    for number, example in enumerate(task.examples(Bytes(), limit=None, max_length=4096)):
        prompt = Bytes().decode(example.requests[0].prompt)
        assert prompt.count(f"Question: q{number}?") == 1
        assert prompt.count("Question:") == 6
        assert len(set(prompt.split("\n\n"))) == 6
    assert task.version != "3.0"


@pytest.mark.parametrize(
    ("words", "strict", "flexible"),
    [
        (" 3 + 4 = 7\n#### 7\n\n", "7", "7"),
        (" it is #### 1,234. and then 99", "1,234.", "99"),
        ("#### -5 #### 6", "-5", "6"),
        (" The answer is $42.", "[invalid]", "$42."),
        (" 12 apples, then 7", "[invalid]", "7"),
        (" none at all", "[invalid]", "[invalid]"),
        ("####7", "[invalid]", "7"),
        (" 3.50 dollars", "[invalid]", "3.50"),
        (" ...", "[invalid]", "..."),
    ],
)
def test_gsm8k_answers_are_read_as_the_harness_reads_them(words, strict, flexible):
    assert gsm8k_answer(words) == strict
    assert gsm8k_answer(words, flexible=True) == flexible


@pytest.mark.parametrize(
    ("words", "gold", "strict", "flexible"),
    [
        (" #### 1234", "#### 1,234", 1, 1),
        (" #### $1,234.", "x\n#### 1234", 0, 1),
        (" #### 1,234.", "x\n#### 1234", 1, 1),
        (" is $1,234.", "#### 1234", 0, 1),
        (" #### 12", "#### 13", 0, 0),
        (" nothing", "#### 13", 0, 0),
        (" #### 13 and 14", "#### 13", 1, 0),
    ],
)
def test_gsm8k_is_judged_without_commas_dollars_and_full_stops(tmp_path, words, gold, strict, flexible):
    rows = [{"question": "q", "answer": gold}, *questions(6)]
    task = only(load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", rows), shots=0))
    (example,) = task.examples(Bytes(), limit=1, max_length=512)
    result = example.judge([(text(words),)])
    assert (result.correct, result.values["flexible_extract"]) == (strict, flexible)
    assert result.gold == gold.rpartition("#### ")[2].replace(",", "")


def test_gsm8k_figures_are_means(tmp_path):
    task = only(load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", questions(6)), shots=1))
    examples = task.examples(Bytes(), limit=None, max_length=512)
    words = ["#### 1000", "#### 1001", "1002", "#### 9", "#### 9", "#### 1,005"]
    results = [example.judge([(text(each),)]) for example, each in zip(examples, words, strict=True)]
    strict, flexible = task.metrics(results)
    assert (strict.name, strict.value) == ("exact_match", 0.5)
    assert strict.stderr == pytest.approx(math.sqrt(0.25 * 6 / 5 / 6))
    assert (flexible.name, flexible.value) == ("flexible_extract", pytest.approx(4 / 6))


def test_gsm8k_refuses_fewer_records_than_examples(tmp_path):
    with pytest.raises(TaskDataError, match="more than 5"):
        load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", questions(5)))


def test_data_that_is_not_as_it_should_be_is_named_by_file_and_line(tmp_path):
    with pytest.raises(TaskDataError, match=r"gsm8k_test\.jsonl, line 7: .*'answer'"):
        load_gsm8k(write(tmp_path / "gsm8k_test.jsonl", [*questions(6), {"question": "q", "answer": 3}]))
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(PROBLEM).encode())[:-5])
    with pytest.raises(TaskDataError, match=r"HumanEval\.jsonl\.gz: expected a whole gzip file"):
        load_humaneval(Sources((tmp_path,), hub=False), unsafe_exec=True)


def test_a_dataset_is_read_where_no_bundle_has_the_task(tmp_path):
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    write(folder / "test.jsonl", questions(3))
    write(folder / "train.jsonl", questions(8, "t"))
    task = only(load_gsm8k(Sources((tmp_path,), hub=False)))
    assert (len(task.test.items), len(task.train.items), task.version) == (3, 8, "3.0")
    with pytest.raises(MissingDataError, match=r"gsm8k_test\.jsonl"):
        load_gsm8k(Sources((tmp_path / "other",), hub=False))


# ---- HumanEval -----------------------------------------------------------------------------------------------------

PROBLEM = {
    "task_id": "T/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
}


@pytest.fixture(scope="module", params=["confined", "unsafe"])
def sandbox(request):
    try:
        return Sandbox.open(Limits(wall_s=5, cpu_s=2), unsafe_exec=request.param == "unsafe")
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("    return x * 2\n", "passed"),
        ("    return 2 * x", "passed"),
        ("    return x + 2\n", "TypeError"),
        ("    return 4\n", "AssertionError"),
        ("    return x *", "SyntaxError"),
        ("    import sys; sys.exit(0)\n", "exit code 0"),
        ("    import os; os._exit(0)\n", "exit code 0"),
        ("    while True: pass\n", r"exit code 137|too much wall time"),  # whichever comes first on a busy machine
        ("    import time; time.sleep(100)\n", "too much wall time"),
        ("    return x * 2\nprint('no last line')\nimport atexit; atexit.register(print, 'x')", "exit code 0"),
    ],
)
def test_a_completion_passes_if_its_program_gets_to_its_end(sandbox, tmp_path, completion, outcome):
    task = HumanEval(split_of([PROBLEM], tmp_path), sandbox)
    (example,) = task.examples(Bytes(), limit=None, max_length=4096)
    assert Bytes().decode(example.requests[0].prompt) == PROBLEM["prompt"]
    assert "\ndef" in example.requests[0].stops
    result = example.judge([(text(completion),)])
    assert result.correct == float(outcome == "passed")
    assert re.search(outcome, result.details["outcomes"][0])


def test_pass_at_k_of_samples(sandbox, tmp_path):
    task = HumanEval(split_of([PROBLEM], tmp_path), sandbox, "humaneval_5", 5, 0.8, (1, 2))
    (example,) = task.examples(Bytes(), limit=None, max_length=512)
    (request,) = example.requests
    assert (request.n, request.temperature, request.max_new) == (5, 0.8, 256)
    right, wrong = text("    return x * 2\n"), text("    return x\n")
    result = example.judge([(right, wrong, wrong, right, wrong)])
    assert (result.scores, result.correct) == ((1.0, 0.0, 0.0, 1.0, 0.0), 0.4)
    first, second = task.metrics([result])
    assert (first.name, first.value) == ("pass@1", pytest.approx(0.4))
    assert (second.name, second.value) == ("pass@2", pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2)))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_humaneval_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    sources = write(tmp_path / "HumanEval.jsonl", [PROBLEM])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailableError, match="--unsafe-exec"):
        load_humaneval(sources)
    assert [item.fields for item in only(load_humaneval(sources, unsafe_exec=True)).split.items] == [PROBLEM]
    with pytest.raises(MissingDataError, match=r"HumanEval\.jsonl"):
        load_humaneval(Sources((tmp_path / "other",), hub=False), unsafe_exec=True)


# ---- GPQA ----------------------------------------------------------------------------------------------------------


def gpqa(folder, count=40, **options):
    rows = [
        {"Question": f"Q{i}", "Correct Answer": f"right {i} ", "Incorrect Answer 1": f"x{i}  y",
         "Incorrect Answer 2": f"b{i}", "Incorrect Answer 3": f"c{i} [title]d"}
        for i in range(count)
    ]  # fmt: skip
    return only(load_gpqa(write(folder / "gpqa_main.jsonl", rows), **options))


def test_gpqa_shows_choices_in_an_order_of_its_seed(tmp_path):
    task, other = gpqa(tmp_path), gpqa(tmp_path, seed=1)
    golds = []
    for number, example in enumerate(task.examples(Bytes(), limit=None, max_length=4096)):
        choices, gold = task.choices(number)
        assert sorted(choices) == sorted([f"right {number}", f"x{number} y", f"b{number}", f"c{number}. d"])
        assert choices["ABCD".index(gold)] == f"right {number}"
        prompt = Bytes().decode(example.requests[0].prompt)
        listed = "".join(f"({letter}) {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
        question = f"What is the correct answer to this question:Q{number}\nChoices:\n"
        assert prompt == f"{question}{listed}Let's think step by step: "
        golds.append(gold)
    assert set(golds) == set("ABCD")
    assert golds == [gpqa(tmp_path, count=50).choices(number)[1] for number in range(40)]
    assert golds != [other.choices(number)[1] for number in range(40)]


@pytest.mark.parametrize(
    ("words", "letter"),
    [("so (A) is wrong. The answer is (C).", "C"), ("C", None), ("(b)", None), ("(B)", "B"), ("(A) or (Z)", "Z")],
)
def test_gpqa_takes_the_last_letter(tmp_path, words, letter):
    assert choice_letter(words) == letter
    task = gpqa(tmp_path)
    examples = task.examples(Bytes(), limit=8, max_length=512)
    results = [example.judge([(text(words),)]) for example in examples]
    assert [result.correct for result in results] == [float(task.choices(i)[1] == letter) for i in range(8)]
    assert {result.pick for result in results} == {letter}
    (metric,) = task.metrics(results)
    assert metric.centered == pytest.approx((metric.value - 0.25) / 0.75)


# ---- real data, and the harness itself -----------------------------------------------------------------------------


@pytest.fixture
def bundle():
    if not SHARED.is_dir():
        pytest.skip("needs shared/data/eval_bundle beside the repository")
    return Sources((SHARED,), hub=False)


def test_the_bundles_questions_are_read(bundle):
    task = only(load_gsm8k(bundle))
    examples = task.examples(Bytes(), limit=None, max_length=8192)
    assert len(examples) == 1319
    golds = [example.judge([(text(row["answer"]),)]) for example, row in zip(examples, task.test.items, strict=True)]
    assert all(result.correct == 1.0 for result in golds), "a reference answer is right"
    assert sum(result.values["flexible_extract"] for result in golds) > 1300


def test_the_bundles_reference_solutions_pass(bundle, sandbox):
    """And not without themselves."""
    split = only(load_humaneval(bundle, unsafe_exec=True)).split
    assert len(split.items) == 164
    task = HumanEval(split, sandbox)
    examples = task.examples(Bytes(), limit=None, max_length=8192)
    chosen = list(zip(examples, split.items, strict=True))[::8]
    for example, row in chosen:
        assert example.judge([(text(row["canonical_solution"]),)]).correct == 1.0, row["task_id"]
        assert example.judge([(text("    pass\n"),)]).correct == 0.0, row["task_id"]


def test_gsm8k_is_the_harness_own(bundle):
    """Prompts, stops and scores, of the harness's template with its few-shot split set to the test set."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    pytest.importorskip("datasets")
    import yaml
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    template = Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    config = yaml.safe_load(template.read_text())
    config |= {"dataset_path": "json", "dataset_name": None, "fewshot_split": "test", "training_split": None}
    config |= {"dataset_kwargs": {"data_files": {"test": str(SHARED / "gsm8k_test.jsonl")}}}
    theirs = ConfigurableTask(config=config)
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(limit=20)
    ours = only(load_gsm8k(bundle)).examples(Bytes(), limit=20, max_length=8192)
    for instance, example in zip(theirs.instances, ours, strict=True):
        prompt, options = instance.args
        assert Bytes().decode(example.requests[0].prompt) == prompt
        assert list(example.requests[0].stops) == options["until"]
    words = ["so #### 18", "it is $3.", "70000 or #### 70,000.", "none", "#### x 9", "1 2 #### -3", "###### 4"] * 3
    for instance, each in zip(theirs.instances, words, strict=False):
        instance.resps = [each]
    theirs.apply_filters()
    for instance, example, each in zip(theirs.instances, ours, words, strict=False):
        mine = example.judge([(text(each),)])
        for name, value in (("strict-match", mine.correct), ("flexible-extract", mine.values["flexible_extract"])):
            scored = theirs.process_results(instance.doc, [instance.filtered_resps[name]])
            assert scored["exact_match"] == value, (name, each)
