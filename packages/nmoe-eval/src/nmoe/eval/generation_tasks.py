"""Tasks whose answers are written: GSM8K, HumanEval, GPQA."""

import random
import re
import secrets
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from nmoe.eval.datasets_local import Split, load_split
from nmoe.eval.errors import MissingDataError
from nmoe.eval.items import Item, read_jsonl
from nmoe.eval.requests import Example, ExampleResult, GenerateRequest, Metric, Text, Tokenizer
from nmoe.eval.results import centered, mean_and_stderr
from nmoe.eval.sandbox import Execution, Sandbox
from nmoe.eval.sources import Sources, Suite

FEWSHOT_SEED = 1234
"""lm-evaluation-harness's `fewshot_random_seed`."""

_INVALID = "[invalid]"
_AT_ONCE = 8
"""Programs that run side by side."""


def bundled_split(sources: Sources, names: Sequence[str]) -> Split | None:
    """A file of an evaluation bundle: the first of the names that stands in a folder, or in `eval_bundle` in it."""
    places = [
        place / name for folder in sources.folders for place in (folder, folder / "eval_bundle") for name in names
    ]
    for path in places:
        if path.is_file():
            items, sha256 = read_jsonl(path)
            return Split(tuple(items), sha256)
    return None


def load_generation_split(
    sources: Sources, names: Sequence[str], dataset: str, config: str | None, split: str
) -> Split:
    """A file of an evaluation bundle, or else a split of a dataset.

    Raises:
        MissingDataError: it is neither; says where it looked.
        TaskDataError: a file is not as it should be.
    """
    try:
        return bundled_split(sources, names) or load_split(sources, dataset, config, split)
    except MissingDataError as error:
        folders = ", ".join(map(str, sources.folders)) or "no folder"
        raise MissingDataError(f"{error}; nor is there {' or '.join(names)} in {folders}") from error


def generation_prompt(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a prompt; of an empty one, the token that stands before a document."""
    return tuple(tokenizer.encode(text)) or (tokenizer.eos_id,)


# ---- GSM8K (arXiv:2110.14168) --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gsm8k:
    """Grade-school mathematics, few-shot, with lm-evaluation-harness's prompt, stops and extraction (its `gsm8k`).

    Examples are drawn for each question from the training set, as the harness draws them. Where there is a test set
    alone, they are drawn from it, never the question itself, and the version says so: it is another prompt.
    """

    test: Split
    train: Split | None
    shots: int = 5
    name: str = "gsm8k"

    @property
    def version(self) -> str:
        """Of the harness's task."""
        return "3.0" if self.train is not None else "3.0, shots of the test set"

    @property
    def data_sha256(self) -> str:
        """Of the test set."""
        return self.test.sha256

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """See `Task`."""
        rng = random.Random(FEWSHOT_SEED)
        stops, max_new = ("Question:", "</s>", "<|im_end|>"), min(256, max_length // 2)
        examples = []
        for number, item in enumerate(self.test.items[:limit]):
            shots = "".join(f"{_question(each)} {each['answer']}\n\n" for each in self._shots(item, rng))
            prompt = shots + _question(item)
            request = GenerateRequest(generation_prompt(tokenizer, prompt), stops, max_new)
            judge = partial(self._judge, str(number), prompt, item["answer"])
            examples.append(Example(str(number), (request,), judge))
        return examples

    def metrics(self, results: Sequence[ExampleResult]) -> list[Metric]:
        """`exact_match` reads what follows `#### `; `flexible_extract` the last number, wherever it is."""
        return [
            Metric("exact_match", *mean_and_stderr([result.correct for result in results])),
            Metric("flexible_extract", *mean_and_stderr([result.values["flexible_extract"] for result in results])),
        ]

    def _shots(self, item: Item, rng: random.Random) -> list[Item]:
        if self.shots == 0:
            return []
        if self.train is not None:
            return rng.sample(self.train.items, self.shots)
        others = [each for each in rng.sample(self.test.items, self.shots + 1) if each.fields != item.fields]
        return others[: self.shots]

    @staticmethod
    def _judge(number: str, prompt: str, gold: str, answers: Sequence[tuple[Text, ...]]) -> ExampleResult:
        (text,) = answers[0]
        strict, flexible = gsm8k_answer(text.text), gsm8k_answer(text.text, flexible=True)
        correct = float(_bare_number(strict) == _bare_number(gold))
        return ExampleResult(
            number, prompt, (text.text,), (correct,), strict, _bare_number(gold), correct,
            values={"flexible_extract": float(_bare_number(flexible) == _bare_number(gold))},
            n_cropped=text.n_cropped, details={"flexible": flexible, "ended": text.ended},
        )  # fmt: skip


def load_gsm8k(sources: Sources, shots: int | None = None) -> Suite:
    """From a bundle's `gsm8k_test.jsonl` and, where it is, `gsm8k_train.jsonl`, or else from `openai/gsm8k`.

    Raises:
        MissingDataError: see `load_generation_split`.
        TaskDataError: an item is not as it should be, or there are too few.
    """
    shots = 5 if shots is None else shots
    here = bundled_split(sources, ["gsm8k_test.jsonl"])
    train = bundled_split(sources, ["gsm8k_train.jsonl"])
    test = here or load_generation_split(sources, ["gsm8k_test.jsonl"], "openai/gsm8k", "main", "test")
    if here is None and train is None:
        train = load_generation_split(sources, ["gsm8k_train.jsonl"], "openai/gsm8k", "main", "train")
    for split in filter(None, (test, train)):
        _check_texts(split, ("question", "answer"))
    pool = (train or test).items
    if len(pool) <= shots:
        raise pool[0].error(f"expected more than {shots} items to draw examples from, found {len(pool)}")
    return Suite((Gsm8k(test, train, shots),))


def gsm8k_answer(text: str, *, flexible: bool = False) -> str:
    """The number that a text gives as its answer, as it is written there; `[invalid]` if there is none.

    Strictly, what follows the first `#### `; flexibly, the last number.
    """
    if not flexible:
        found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
        return found[0].strip() if found else _INVALID
    pairs = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return (pairs[-1][0] or pairs[-1][1]).strip() if pairs else _INVALID


def _bare_number(text: str) -> str:
    """Without what does not count when answers are compared."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


def _question(item: Item) -> str:
    return f"Question: {item['question']}\nAnswer:"


# ---- HumanEval (arXiv:2107.03374) ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HumanEval:
    """Python functions written from their docstrings, and run against tests in a sandbox. Prompt and stops are
    lm-evaluation-harness's."""

    split: Split
    sandbox: Sandbox
    name: str = "humaneval"
    n: int = 1
    """Samples of each problem."""
    temperature: float = 0.0
    ks: tuple[int, ...] = (1,)
    """pass@k for each; at most n."""
    shots: int = 0

    @property
    def version(self) -> str:
        """Of the harness's task, and how samples are drawn."""
        return "1.0" if self.n == 1 else f"1.0, {self.n} samples at temperature {self.temperature:g}"

    @property
    def data_sha256(self) -> str:
        """Of the problems."""
        return self.split.sha256

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """See `Task`."""
        examples = []
        for item in self.split.items[:limit]:
            request = GenerateRequest(
                generation_prompt(tokenizer, item["prompt"]),
                ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
                min(1024, max_length // 2),
                temperature=self.temperature,
                top_p=0.95 if self.temperature else 1.0,
                n=self.n,
            )
            examples.append(Example(item["task_id"], (request,), partial(self._judge, item)))
        return examples

    def metrics(self, results: Sequence[ExampleResult]) -> list[Metric]:
        """pass@k, the mean over problems."""
        names = [f"pass@{k}" for k in self.ks]
        return [Metric(name, *mean_and_stderr([result.values[name] for result in results])) for name in names]

    def _judge(self, item: Item, answers: Sequence[tuple[Text, ...]]) -> ExampleResult:
        texts = answers[0]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            ended = list(pool.map(lambda text: passes(self.sandbox, item, text.text), texts))
        scores = tuple(float(passed) for passed, _ in ended)
        right = int(sum(scores))
        return ExampleResult(
            item["task_id"], item["prompt"], tuple(text.text for text in texts), scores,
            None, item["entry_point"], right / len(texts),
            values={f"pass@{k}": pass_at_k(len(texts), right, k) for k in self.ks},
            n_cropped=max(text.n_cropped for text in texts),
            details={"outcomes": ["passed" if passed else outcome(done) for passed, done in ended]},
        )  # fmt: skip


def load_humaneval(
    sources: Sources,
    *,
    name: str = "humaneval",
    n: int = 1,
    temperature: float = 0.0,
    ks: tuple[int, ...] = (1,),
    unsafe_exec: bool = False,
) -> Suite:
    """From a bundle's `HumanEval.jsonl`, `.gz` or not, or else from `openai/openai_humaneval`.

    Raises:
        SandboxUnavailableError: programs cannot be contained here, and `unsafe_exec` is not set.
        MissingDataError, TaskDataError: see `load_generation_split`.
    """
    names = ["HumanEval.jsonl.gz", "HumanEval.jsonl"]
    split = load_generation_split(sources, names, "openai/openai_humaneval", None, "test")
    _check_texts(split, ("task_id", "prompt", "entry_point", "test"))
    return Suite((HumanEval(split, Sandbox.open(unsafe_exec=unsafe_exec), name, n, temperature, ks),))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Of n samples c are right: the unbiased estimate that of k samples one is, 1 - C(n - c, k) / C(n, k) (arXiv:
    2107.03374, equation 1)."""
    if n - c < k:
        return 1.0
    wrong = 1.0
    for i in range(n - c + 1, n + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def passes(sandbox: Sandbox, item: Item, completion: str) -> tuple[bool, Execution]:
    """Whether a problem's prompt with a completion passes its tests, and how the program ended. It must get to its last
    line: a completion that ends the process is no solution."""
    token = secrets.token_hex(16)
    program = f"{item['prompt']}{completion}\n{item['test']}\ncheck({item['entry_point']})\nprint({token!r})\n"
    done = sandbox.run(program)
    return done.ok and done.stdout.endswith(token + "\n"), done


def outcome(done: Execution) -> str:
    """How a program that did not pass ended, in a few words."""
    if done.end != "exit":
        return f"too much {done.end}"
    last = done.stderr.strip().rpartition("\n")[2]
    return last[:200] or f"exit code {done.exit_code}"


# ---- GPQA (arXiv:2311.12022) ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpqa:
    """Questions of graduates' science with four choices, thought about step by step; prompt and extraction are those of
    lm-evaluation-harness's `gpqa_main_cot_zeroshot` (`flexible-extract`, without reading choices' own words).

    The harness shuffles choices by one global generator; here each question has its own, of the seed and its number, so
    that neither a limit nor another task changes the order.
    """

    split: Split
    seed: int = 0
    name: str = "gpqa"
    version: str = "2.2"
    shots: int = 0

    @property
    def data_sha256(self) -> str:
        """Of the questions."""
        return self.split.sha256

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """See `Task`."""
        examples = []
        for number, item in enumerate(self.split.items[:limit]):
            choices, gold = self.choices(number)
            listed = "".join(f"({letter}) {text}\n" for letter, text in zip("ABCD", choices, strict=True))
            question = f"What is the correct answer to this question:{item['Question']}\nChoices:\n"
            prompt = f"{question}{listed}Let's think step by step: "
            request = GenerateRequest(generation_prompt(tokenizer, prompt), ("</s>",), min(1024, max_length // 2))
            examples.append(Example(str(number), (request,), partial(self._judge, str(number), prompt, gold)))
        return examples

    def metrics(self, results: Sequence[ExampleResult]) -> list[Metric]:
        """The share of right letters."""
        value, stderr = mean_and_stderr([result.correct for result in results])
        return [Metric("exact_match", value, stderr, centered(value, 0.25))]

    def choices(self, number: int) -> tuple[list[str], str]:
        """A question's choices in the order in which they are shown, and the letter of the right one."""
        item = self.split.items[number]
        texts = [_tidy(item[key]) for key in _GPQA_CHOICES]
        order = list(range(4))
        random.Random(f"{self.seed}/{number}").shuffle(order)
        return [texts[place] for place in order], "ABCD"[order.index(3)]

    @staticmethod
    def _judge(number: str, prompt: str, gold: str, answers: Sequence[tuple[Text, ...]]) -> ExampleResult:
        (text,) = answers[0]
        pick = choice_letter(text.text)
        return ExampleResult(
            number, prompt, (text.text,), (float(pick == gold),), pick, gold, float(pick == gold),
            n_cropped=text.n_cropped, details={"ended": text.ended},
        )  # fmt: skip


_GPQA_CHOICES = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")


def load_gpqa(sources: Sources, *, seed: int = 0) -> Suite:
    """From a bundle's `gpqa_main.jsonl`, or else from `Idavidrein/gpqa`, which asks for consent.

    Raises:
        MissingDataError, TaskDataError: see `load_generation_split`.
    """
    split = load_generation_split(sources, ["gpqa_main.jsonl"], "Idavidrein/gpqa", "gpqa_main", "train")
    _check_texts(split, ("Question", *_GPQA_CHOICES))
    return Suite((Gpqa(split, seed),))


def _check_texts(split: Split, keys: Sequence[str]) -> None:
    for item in split.items:
        for key in keys:
            item.text(key)


def choice_letter(text: str) -> str | None:
    """The last letter in parentheses, which is what a text that thinks aloud ends with; None if there is none."""
    found = re.findall(rf"\(([{string.ascii_uppercase}])\)", text)
    return found[-1] if found else None


def _tidy(text: str) -> str:
    return text.strip().replace(" [title]", ". ").replace("  ", " ")
