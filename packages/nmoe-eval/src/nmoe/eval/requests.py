"""What a task asks of a model, what it is answered, and what it makes of the answers.

A task yields examples. Each has requests, all of one kind, and makes a result of their answers. Whoever answers knows
nothing of tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias


class Tokenizer(Protocol):
    """What eval needs of a tokenizer."""

    name: str
    eos_id: int
    """Ends every document, and so stands before the first token of the next."""
    n_vocab: int
    """Ids in all: what a model's head has beyond them is never generated."""

    @property
    def fingerprint(self) -> str:
        """Identifies the ids of every text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special ones among them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special ones add nothing."""
        ...


@dataclass(frozen=True)
class ScoreRequest:
    """How likely is a continuation after a context?"""

    context: tuple[int, ...]
    """Token ids, at least one."""
    continuation: tuple[int, ...]
    """Token ids, at least one."""
    n_cropped: int = 0
    """Tokens that the task itself has already cut from the context's left."""


@dataclass(frozen=True)
class Score:
    """The answer to a `ScoreRequest`."""

    logprob: float
    """Sum over the continuation's tokens, in nats."""
    greedy: bool
    """Whether each of them is the likeliest one at its place."""
    n_tokens: int
    """Of the continuation."""
    n_cropped: int = 0
    """Tokens that were cut from the context's left because they did not fit."""


@dataclass(frozen=True)
class GenerateRequest:
    """How does a text go on?"""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    stops: tuple[str, ...]
    """The text ends before the first of these; the end-of-text token always ends it."""
    max_new: int
    """Tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Sample i of `n` draws from a stream of its own, whatever else is in the batch."""
    n: int = 1
    """Texts wanted."""


@dataclass(frozen=True)
class Text:
    """One text of the answer to a `GenerateRequest`, which is a tuple of `n` of them."""

    text: str
    """Without the prompt and the stop."""
    n_tokens: int
    """Generated, those of the stop and the end-of-text token included."""
    ended: Literal["stop", "eos", "length"]
    n_cropped: int = 0
    """Tokens that were cut from the prompt's left because they did not fit."""


Request: TypeAlias = ScoreRequest | GenerateRequest
Answer: TypeAlias = Score | tuple[Text, ...]


@dataclass(frozen=True)
class ExampleResult:
    """What became of one example. All that is written to disk about it: values are those of JSON."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    """Texts to choose from; of generation, the texts that were generated."""
    scores: tuple[float, ...]
    """One a choice, the greater the better; its definition is the task's."""
    pick: int | str | None
    """The chosen one; of generation, the answer that was read from the text, None if there was none to read."""
    gold: int | str | None
    correct: float
    """1 or 0; of several samples, the share that is right."""
    values: dict[str, float] = field(default_factory=dict)
    """What the task's other metrics are computed from, such as `acc_norm`."""
    group: str | None = None
    """Part of the task, such as a subject."""
    n_cropped: int = 0
    """Tokens that were cut from its longest prompt's left."""
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reader of the file may want to see."""


@dataclass(frozen=True)
class Example:
    """One item of a task."""

    id: str
    """Unique in its task, the same on every machine."""
    requests: tuple[Request, ...]
    """All of one kind."""
    judge: Callable[[Sequence[Any]], ExampleResult]
    """Makes a result of the answers, which come in the order of the requests, and must not touch the model. That of
    texts is called on one rank alone, and may take time (a sandbox)."""


class Task(Protocol):
    """One task with its data at hand."""

    @property
    def name(self) -> str:
        """As it is asked for."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever its numbers would."""
        ...

    @property
    def shots(self) -> int:
        """Examples before each item."""
        ...

    @property
    def data_sha256(self) -> str:
        """Of what was read, so that a result tells which data it is of."""
        ...

    def examples(self, tokenizer: Tokenizer, *, limit: int | None, max_length: int) -> list[Example]:
        """The first `limit` examples, the same on every rank.

        Args:
            tokenizer: of the model.
            limit: None for all.
            max_length: tokens that the model sees at once.
        """
        ...

    def metrics(self, results: Sequence[ExampleResult]) -> "list[Metric]":
        """The task's figures, the first of them the one that it is known by."""
        ...


@dataclass(frozen=True)
class Metric:
    """A figure of a task."""

    name: str
    value: float
    stderr: float | None = None
    """Of the mean over examples; None where it cannot be told."""
    centered: float | None = None
    """0 is chance and 1 is perfect; None where the task has no baseline."""
