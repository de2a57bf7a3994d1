"""Evaluates a model on tasks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from nmoe.eval.engine import Engine
from nmoe.eval.errors import EvalError
from nmoe.eval.generate import generate_texts
from nmoe.eval.lockstep import gather, together
from nmoe.eval.registry import load_suites
from nmoe.eval.requests import Example, ExampleResult, GenerateRequest, ScoreRequest, Task, Tokenizer
from nmoe.eval.results import Results, Row, TaskResult
from nmoe.eval.sources import Sources, Suite
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World, alone

Progress = Callable[[str, int, int], None]
"""Is told of a task how much of how much is done; the unit is the task's own."""


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    sources: Sources,
    max_length: int,
    max_tokens: int,
    limit: int | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Results:
    """Measures a model on tasks by their names; see `nmoe.eval.registry.load_suites`.

    Several ranks call it together, and get the same results. All data is read before anything is computed.

    Args:
        model: its training mode is left as it was.
        tokenizer: of the model.
        tasks: names.
        sources: where data may be.
        max_length: tokens that the model sees at once.
        max_tokens: of a forward call; see `nmoe.eval.engine.Engine`.
        limit: of each task, the first so many examples; None for all.
        world: the ranks; None: this one alone.
        progress: called on every rank.

    Raises:
        EvalError: of one of its kinds, on every rank; RankError where another rank failed.
    """
    world = alone(model.head.weight.device) if world is None else world
    suites = together(world, "eval data", lambda: load_suites(tasks, sources))
    return evaluate_suites(
        model,
        tokenizer,
        list(suites.values()),
        max_length=max_length,
        max_tokens=max_tokens,
        limit=limit,
        world=world,
        progress=progress,
    )


def evaluate_suites(
    model: Transformer,
    tokenizer: Tokenizer,
    suites: Sequence[Suite],
    *,
    max_length: int,
    max_tokens: int,
    limit: int | None = None,
    world: World | None = None,
    progress: Progress | None = None,
) -> Results:
    """As `evaluate`, of tasks whose data is at hand."""
    world = alone(model.head.weight.device) if world is None else world
    if limit is not None and limit < 1:
        raise EvalError(f"expected a limit of at least one example, found {limit}")
    engine = Engine(model, max_length=max_length, max_tokens=max_tokens, world=world)
    results: list[TaskResult] = []
    summaries: list[Row] = []
    for suite in suites:
        of_suite = [_evaluate_task(engine, tokenizer, task, limit, progress) for task in suite.tasks]
        results += of_suite
        if suite.summarise is not None:
            summaries += suite.summarise(of_suite)
    return Results(
        tuple(results),
        tuple(summaries),
        tokenizer=f"{tokenizer.name} {tokenizer.fingerprint}",
        warnings=tuple(warning for result in results for warning in _warnings(result)),
    )


def _evaluate_task(
    engine: Engine, tokenizer: Tokenizer, task: Task, limit: int | None, progress: Progress | None
) -> TaskResult:
    begun, world = time.monotonic(), engine.world

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(task.name, done, total)

    tell(0, 1)
    examples = together(
        world, "eval examples", lambda: task.examples(tokenizer, limit=limit, max_length=engine.max_length)
    )
    if not examples:
        raise EvalError(f"expected at least one example of {task.name}, found none")
    answers = _answers(engine, tokenizer, examples, tell)
    if all(isinstance(request, ScoreRequest) for example in examples for request in example.requests):
        judged = list(_judged(examples, answers).values())
    else:
        # Judging a text may take long, as running programs does: each rank does its share.
        mine = together(world, "eval judgement", lambda: _judged(examples, answers, world.rank, world.size))
        told = gather(world, "eval results", {number: asdict(result) for number, result in mine.items()}, len(examples))
        judged = [_result(fields) for fields in told]
    return TaskResult(
        task=task.name,
        version=task.version,
        shots=task.shots,
        data_sha256=task.data_sha256,
        metrics=tuple(task.metrics(judged)),
        examples=tuple(judged),
        limit=limit,
        seconds=time.monotonic() - begun,
    )


def _answers(
    engine: Engine, tokenizer: Tokenizer, examples: Sequence[Example], tell: Callable[[int, int], None]
) -> list[Any]:
    """In the order of the examples' requests."""
    requests = [request for example in examples for request in example.requests]
    scored = [request for request in requests if isinstance(request, ScoreRequest)]
    if len(scored) == len(requests):
        return list(engine.score(scored, tell))
    texts = [request for request in requests if isinstance(request, GenerateRequest)]
    assert len(texts) == len(requests), "a task's requests are of one kind"
    training = engine.model.training
    engine.model.eval()
    try:
        return list(
            generate_texts(
                engine.model,
                tokenizer,
                texts,
                max_tokens=engine.max_tokens,
                max_length=engine.max_length,
                world=engine.world,
                progress=tell,
            )
        )
    finally:
        engine.model.train(training)


def _judged(
    examples: Sequence[Example], answers: Sequence[Any], first: int = 0, step: int = 1
) -> dict[int, ExampleResult]:
    """By number, the results of every so-manieth example."""
    found, at = {}, 0
    for number, example in enumerate(examples):
        if number % step == first:
            found[number] = example.judge(answers[at : at + len(example.requests)])
        at += len(example.requests)
    return found


def _result(fields: dict[str, Any]) -> ExampleResult:
    """As it was before it was shared: JSON has lists for tuples."""
    return ExampleResult(**{**fields, "choices": tuple(fields["choices"]), "scores": tuple(fields["scores"])})


def _warnings(result: TaskResult) -> list[str]:
    found = []
    if result.n_cropped:
        n_tokens = sum(example.n_cropped for example in result.examples)
        found.append(
            f"{result.task}: {result.n_cropped} of {len(result.examples)} prompts were longer than the model's context "
            f"and lost {n_tokens} tokens on the left"
        )
    odd = sum(any(not math.isfinite(score) for score in example.scores) for example in result.examples)
    if odd:
        found.append(f"{result.task}: {odd} of {len(result.examples)} examples have a choice without a finite score")
    return found
