"""Choice tasks: which of several texts is the likeliest, with the prompts of lm-evaluation-harness."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nmoe.eval.datasets_local import Split, load_split
from nmoe.eval.encode import encode_pairs
from nmoe.eval.errors import MissingDataError, TaskDataError
from nmoe.eval.items import Item
from nmoe.eval.requests import Example, ExampleResult, Metric, Score, ScoreRequest, Tokenizer
from nmoe.eval.results import centered, mean_and_stderr
from nmoe.eval.sources import Sources, Suite

_SHOTS_SEED = 1234
_TARGET, _SHOT = " ", "\n\n"
"""Between a context and its continuation, and behind an example."""


@dataclass(frozen=True)
class Question:
    """An item as a task words it. Either the contexts or the continuations are one for all choices."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    """Whose lengths in characters normalise their log-probabilities."""
    gold: int

    @classmethod
    def of_choices(cls, context: str, choices: Sequence[str], gold: int) -> "Question":
        """The choices follow one context."""
        return cls((context,) * len(choices), tuple(choices), tuple(choices), gold)

    @classmethod
    def of_contexts(cls, contexts: Sequence[str], continuation: str, gold: int) -> "Question":
        """One text follows each of the contexts, which are the choices."""
        return cls(tuple(contexts), (continuation,) * len(contexts), tuple(contexts), gold)

    @property
    def solved(self) -> str:
        """Context and continuation of the right choice, as an example."""
        return self.contexts[self.gold] + _TARGET + self.continuations[self.gold] + _SHOT


@dataclass(frozen=True)
class ChoiceSpec:
    """What makes a choice task. Prompts, splits and sampling are those of the harness's task `harness`."""

    name: str
    harness: str
    version: str
    dataset: str
    configs: tuple[str | None, ...]
    """Of the dataset: each is a group of the task."""
    split: str
    """That is evaluated."""
    shots_split: str
    """That examples are drawn from."""
    word: Callable[[Item], Question]
    """Raises TaskDataError."""
    n_choices: int
    """Whose inverse is the baseline."""
    shots: int = 0
    """If nothing else is asked for."""
    sampler: Literal["random", "first"] = "random"
    has_test_split: bool = True
    """Whether the harness knows a test split. It draws one example more where it does not, and leaves the item out."""
    description: Callable[[str | None], str] = lambda config: ""
    """Stands before the examples; takes the config."""


def load_choice(spec: ChoiceSpec, sources: Sources, shots: int | None = None) -> Suite:
    """The task with its data.

    Raises:
        MissingDataError: a split is not to be had. With `sources.allow_missing`, groups without data are left out, if
            there is one with it.
        TaskDataError: data is not as it should be.
    """
    shots = spec.shots if shots is None else shots
    groups, missing = [], []
    for config in spec.configs:
        try:
            items = load_split(sources, spec.dataset, config, spec.split)
            pool = load_split(sources, spec.dataset, config, spec.shots_split) if shots else None
        except MissingDataError as error:
            missing.append(error)
            if sources.hub and not sources.allow_missing:
                break  # a hub that cannot be reached is tried again and again: not for each group
            continue
        groups.append(_Group(config, items, pool))
    if missing and (not groups or not sources.allow_missing):
        more = f"; and {len(missing) - 1} more of {len(spec.configs)}" if len(missing) > 1 else ""
        remedy = ": name the folder of a local copy with --data" + (
            ", or add --allow-missing for a partial score" if groups else ""
        )
        raise MissingDataError(f"task {spec.name}: {missing[0]}{more}{remedy}")
    note = f"partial ({len(groups)}/{len(spec.configs)})" if missing else ""
    return Suite((ChoiceTask(spec, shots, tuple(groups), note),))


@dataclass(frozen=True)
class _Group:
    config: str | None
    items: Split
    pool: Split | None


@dataclass(frozen=True)
class ChoiceTask:
    """A choice task with its data; see `nmoe.eval.requests.Task`."""

    spec: ChoiceSpec
    shots: int
    groups: tuple[_Group, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """As it is asked for."""
        return self.spec.name

    @property
    def version(self) -> str:
        """Its own; `partial (…)` with it where groups are missing, since its numbers are others then."""
        return f"{self.spec.version} {self.note}".strip()

    @property
    def data_sha256(self) -> str:
        """Of all splits that were read; the split's own where there is one."""
        digests = [split.sha256 for group in self.groups for split in (group.items, group.pool) if split is not None]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """See `Task.examples`. Of several groups, the limit is each one's.

        Raises:
            TaskDataError: an item is not as it should be.
        """
        asked: list[tuple[_Group, Item, Question, list[str]]] = []
        for group in self.groups:
            prefixes = self._prefixes(group)
            for item, prefix in zip(group.items.items[:limit], prefixes, strict=False):
                question = self.spec.word(item)
                asked.append((group, item, question, [prefix + context for context in question.contexts]))
        pairs = [
            (context, _TARGET + continuation)
            for _, _, question, contexts in asked
            for context, continuation in zip(contexts, question.continuations, strict=True)
        ]
        encoded = iter(encode_pairs(tokenizer, pairs))
        examples = []
        for group, item, question, contexts in asked:
            requests = []
            for number in range(len(contexts)):
                context, continuation = next(encoded)
                if not continuation:
                    raise item.error(f"expected tokens of choice {number}, found an empty one")
                if len(continuation) > max_length:
                    raise item.error(
                        f"expected choice {number} to fit in the {max_length} tokens that the model sees at once, "
                        f"found {len(continuation)}: evaluate with a longer context"
                    )
                requests.append(ScoreRequest(tuple(context), tuple(continuation)))
            several = len(self.groups) > 1
            name = f"{group.config}/{item.line}" if several else str(item.line)
            examples.append(_example(name, group.config if several else None, question, contexts, tuple(requests)))
        return examples

    def metrics(self, results: Sequence[ExampleResult]) -> list[Metric]:
        """Accuracy, plain and with log-probabilities over the choices' lengths in characters."""
        baseline = 1 / self.spec.n_choices
        found = []
        for name, values in (
            ("acc", [result.correct for result in results]),
            ("acc_norm", [result.values["acc_norm"] for result in results]),
        ):
            value, stderr = mean_and_stderr(values)
            found.append(Metric(name, value, stderr, centered(value, baseline)))
        return found

    def _prefixes(self, group: _Group) -> Iterator[str]:
        """What stands before each item of a group, in their order."""
        description = self.spec.description(group.config)
        if group.pool is None:
            yield from (description for _ in group.items.items)
            return
        pool = group.pool.items
        wanted = self.shots + (0 if self.spec.has_test_split else 1)
        if len(pool) < wanted:
            raise TaskDataError(pool[0].path, None, f"expected {wanted} items to draw examples from, found {len(pool)}")
        generator = random.Random(_SHOTS_SEED)
        for item in group.items.items:
            if self.spec.sampler == "first":
                shown = list(pool)
            else:
                shown = generator.sample(pool, wanted)
                if not self.spec.has_test_split:
                    shown = [each for each in shown if each.fields != item.fields]
            yield description + "".join(self.spec.word(each).solved for each in shown[: self.shots])


def _example(
    name: str, group: str | None, question: Question, contexts: Sequence[str], requests: tuple[ScoreRequest, ...]
) -> Example:
    def judge(answers: Sequence[Score]) -> ExampleResult:
        scores = [answer.logprob for answer in answers]
        normed = [score / max(1, len(choice)) for score, choice in zip(scores, question.choices, strict=True)]
        pick = scores.index(max(scores))
        return ExampleResult(
            id=name,
            prompt=contexts[question.gold],
            choices=question.choices,
            scores=tuple(scores),
            pick=pick,
            gold=question.gold,
            correct=float(pick == question.gold),
            values={"acc_norm": float(normed.index(max(normed)) == question.gold)},
            group=group,
            n_cropped=max(answer.n_cropped for answer in answers),
        )

    return Example(name, requests, judge)
