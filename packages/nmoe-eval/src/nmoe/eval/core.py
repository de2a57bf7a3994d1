"""CORE (DataComp-LM, arXiv:2406.11794): in-context tasks of three kinds, as nanochat's public evaluation defines them.

Data is shuffled by `Random(1337)`; the few-shot examples of item i are drawn by `Random(1234 + i)` from all others. A
choice is scored by the mean loss of its own tokens: those behind what all choices begin with (multiple choice), or
those that all end with (schema). Of language modelling, every token of the continuation must be the likeliest one.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from nmoe.eval.bundle import BundleTask, find_bundle, read_bundle
from nmoe.eval.encode import encode_all
from nmoe.eval.errors import MissingDataError, TaskDataError, UnknownTaskError
from nmoe.eval.items import Item, read_jsonl
from nmoe.eval.requests import Example, ExampleResult, Metric, Score, ScoreRequest, Tokenizer
from nmoe.eval.results import Row, TaskResult, centered, mean_and_stderr
from nmoe.eval.sources import Sources, Suite

VERSION = "1"
_ORDER_SEED, _SHOTS_SEED = 1337, 1234


def load_core(sources: Sources, label: str | None = None) -> Suite:
    """All tasks of the bundle and their mean, or the one with `label`.

    Raises:
        MissingDataError: the bundle or data of a task is not there, with all that is missing and where it should be;
            with `sources.allow_missing`, tasks without data are left out instead, if there is one with it.
        TaskDataError: a file is not as it should be.
        UnknownTaskError: the bundle names no such task.
    """
    folder = find_bundle(sources.places)
    entries = read_bundle(folder)
    if label is not None:
        named = [entry for entry in entries if entry.label == label]
        if not named:
            known = ", ".join(entry.label for entry in entries)
            raise UnknownTaskError(f"expected one of CORE's tasks, {known}; found {label!r}")
        entries = named
    missing = [entry for entry in entries if not entry.path.is_file()]
    if len(missing) == len(entries) or (missing and not sources.allow_missing):
        listed = "\n".join(f"  {entry.label}: {entry.path}" for entry in missing)
        raise MissingDataError(
            f"expected the data of {len(entries)} tasks, found that of {len(entries) - len(missing)}; missing:\n"
            f"{listed}\nput it there, or add --allow-missing for a partial score"
        )
    tasks = tuple(CoreTask.open(entry) for entry in entries if entry not in missing)
    if label is not None:
        return Suite(tasks)
    note = f"partial ({len(tasks)}/{len(entries)})" if missing else ""
    return Suite(tasks, lambda results: [core_row(results, note)])


def core_row(results: Sequence[TaskResult], note: str = "") -> Row:
    """The mean of the centered accuracies."""
    values = [metric.centered for result in results for metric in result.metrics if metric.centered is not None]
    scales = [
        metric.stderr * (1 - metric.centered) / (1 - metric.value) if metric.value < 1 else 0.0
        for result in results
        for metric in result.metrics
        if metric.centered is not None and metric.stderr is not None
    ]
    stderr = math.sqrt(math.fsum(each * each for each in scales)) / len(values) if len(scales) == len(values) else None
    mean = math.fsum(values) / len(values)
    return Row("core", VERSION, None, "centered", mean, stderr, mean, len(values), note)


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle; see `nmoe.eval.requests.Task`."""

    entry: BundleTask
    items: tuple[Item, ...]
    """In the file's order."""
    data_sha256: str

    version = VERSION

    @classmethod
    def open(cls, entry: BundleTask) -> "CoreTask":
        """Reads and checks its data.

        Raises:
            TaskDataError: a line is not as it should be, or there are too few.
        """
        items, digest = read_jsonl(entry.path)
        if len(items) <= entry.shots:
            raise TaskDataError(
                entry.path, None, f"expected more than {entry.shots} items, of which others are examples, found "
                f"{len(items)}"
            )  # fmt: skip
        for item in items:
            _check(entry, item)
        return cls(entry, tuple(items), digest)

    @property
    def name(self) -> str:
        """`core/` and its label."""
        return f"core/{self.entry.label}"

    @property
    def shots(self) -> int:
        """Examples before each item."""
        return self.entry.shots

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """See `Task.examples`. Few-shot examples are drawn from the items within the limit, and from as many more as
        it takes to have enough of them.

        Raises:
            TaskDataError: what is to be predicted has no token, or more than the model sees at once.
        """
        items = list(self.items)
        random.Random(_ORDER_SEED).shuffle(items)
        count = len(items) if limit is None else min(limit, len(items))
        pool = items[: max(count, self.shots + 1)]
        prompts = [self._prompts(pool, number) for number in range(count)]
        encoded = iter(encode_all(tokenizer, [text for texts in prompts for text in texts]))
        build = self._continuation if self.entry.kind == "language_modeling" else self._choice
        examples = []
        for number, texts in enumerate(prompts):
            tokens = [[tokenizer.eos_id, *next(encoded)] for _ in texts]
            examples.append(build(pool[number], texts, tokens, max_length))
        return examples

    def metrics(self, results: Sequence[ExampleResult]) -> list[Metric]:
        """Accuracy."""
        value, stderr = mean_and_stderr([result.correct for result in results])
        return [Metric("acc", value, stderr, centered(value, self.entry.baseline))]

    def _prompts(self, pool: Sequence[Item], number: int) -> list[str]:
        """What is encoded: a text a choice; of language modelling, the text without its continuation and with it."""
        others = [i for i in range(len(pool)) if i != number]
        drawn = random.Random(_SHOTS_SEED + number).sample(others, self.shots) if self.shots else []
        item, delimiter = pool[number].fields, self.entry.delimiter
        shown = [pool[i].fields for i in drawn]
        if self.entry.kind == "multiple_choice":
            before = "".join(f"{each['query']}{delimiter}{each['choices'][each['gold']]}\n\n" for each in shown)
            return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
        if self.entry.kind == "schema":
            before = "".join(
                f"{each['context_options'][each['gold']]}{delimiter}{each['continuation']}\n\n" for each in shown
            )
            return [f"{before}{option}{delimiter}{item['continuation']}" for option in item["context_options"]]
        before = "".join(f"{each['context'].strip()}{delimiter}{each['continuation']}\n\n" for each in shown)
        without = f"{before}{item['context'].strip()}{delimiter}"
        # Stripped, since white space at the end would become part of the continuation's first token.
        return [without.strip(), without + item["continuation"]]

    def _choice(self, item: Item, texts: Sequence[str], tokens: Sequence[list[int]], max_length: int) -> Example:
        """The greater the mean log-probability, the better; ties go to the first."""
        if self.entry.kind == "multiple_choice":
            shared = _n_shared(tokens)
            starts = [shared] * len(tokens)
        else:
            shared = _n_shared([each[::-1] for each in tokens])
            starts = [len(each) - shared for each in tokens]
        requests = [
            None if start == len(each) else _request(item, each, start, max_length)
            for each, start in zip(tokens, starts, strict=True)
        ]
        asked = [number for number, request in enumerate(requests) if request is not None]
        choices = item["choices"] if self.entry.kind == "multiple_choice" else item["context_options"]
        gold = item["gold"]
        prompt = texts[0].removesuffix(choices[0]) if self.entry.kind == "multiple_choice" else texts[gold]

        def judge(answers: Sequence[Score]) -> ExampleResult:
            # A choice that another one begins with has no token of its own: its mean is not a number. Python's `min`
            # then decides as it does in the definition.
            losses = [math.nan] * len(requests)
            for number, answer in zip(asked, answers, strict=True):
                losses[number] = -answer.logprob / answer.n_tokens
            pick = losses.index(min(losses))
            return ExampleResult(
                id=str(item.line),
                prompt=prompt,
                choices=tuple(choices),
                scores=tuple(-loss for loss in losses),
                pick=pick,
                gold=gold,
                correct=float(pick == gold),
                n_cropped=max((answer.n_cropped for answer in answers), default=0),
            )

        return Example(str(item.line), tuple(request for request in requests if request is not None), judge)

    def _continuation(self, item: Item, texts: Sequence[str], tokens: Sequence[list[int]], max_length: int) -> Example:
        without, whole = tokens
        start = _n_shared(tokens)
        # A token that spans the border belongs to what is predicted.
        if start == len(whole):
            raise item.error("expected a continuation with a token of its own, found an empty one")
        request = _request(item, whole, start, max_length)
        spans = start < len(without)

        def judge(answers: Sequence[Score]) -> ExampleResult:
            (answer,) = answers
            return ExampleResult(
                id=str(item.line),
                prompt=texts[0],
                choices=(item["continuation"],),
                scores=(answer.logprob,),
                pick=0 if answer.greedy else None,
                gold=0,
                correct=float(answer.greedy),
                n_cropped=answer.n_cropped,
                details={"token_spans_border": True} if spans else {},
            )

        return Example(str(item.line), (request,), judge)


def _check(entry: BundleTask, item: Item) -> None:
    if entry.kind == "language_modeling":
        item.text("context")
        item.text("continuation", empty=False)
        return
    if entry.kind == "multiple_choice":
        item.text("query")
        choices = item.texts("choices")
    else:
        item.text("continuation", empty=False)
        choices = item.texts("context_options")
    item.index("gold", len(choices))


def _request(item: Item, tokens: Sequence[int], start: int, max_length: int) -> ScoreRequest:
    """Tokens from `start` on, after those before it; of all together the last `max_length`."""
    cropped = max(0, len(tokens) - max_length)
    if start <= cropped:
        raise item.error(
            f"expected {len(tokens) - start} tokens to predict and one before them to fit in the {max_length} that the "
            "model sees at once: leave the item out, or evaluate with a longer context"
        )
    return ScoreRequest(tuple(tokens[cropped:start]), tuple(tokens[start:]), cropped)


def _n_shared(sequences: Sequence[list[int]]) -> int:
    """Tokens that all begin with."""
    least, most = min(sequences), max(sequences)  # in the dictionary's order: what these share, all do
    for number, (left, right) in enumerate(zip(least, most, strict=False)):
        if left != right:
            return number
    return min(len(least), len(most))
