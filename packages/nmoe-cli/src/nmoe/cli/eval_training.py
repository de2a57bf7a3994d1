"""Tasks that are measured while a run trains."""

import dataclasses
from collections.abc import Sequence

from nmoe.cli.config import RunConfig
from nmoe.data.tokenizers import Tokenizer
from nmoe.eval.results import Results
from nmoe.eval.runner import evaluate_suites
from nmoe.eval.sources import Suite
from nmoe.model.transformer import Transformer
from nmoe.rdep.errors import RdepError
from nmoe.rdep.world import World
from nmoe.train.protocols import Reporter


def measure_suites(
    model: Transformer,
    tokenizer: Tokenizer,
    suites: Sequence[Suite],
    config: RunConfig,
    world: World,
    reporter: Reporter,
) -> Results | None:
    """What the tasks give, or None, on all ranks, where they failed on one: that is told, and training goes on. All
    ranks call it together.

    Raises:
        RdepError: ranks lost one another, or exchanged what cannot be trusted: there is nothing to go on with.
    """
    results, failure = None, ""
    try:
        results = evaluate_suites(
            model,
            tokenizer,
            suites,
            max_length=config.train.seq_len,
            # A step's own forward calls are as large: exchanges between ranks have room for no more.
            max_tokens=config.train.micro_batch_size * config.train.seq_len,
            limit=config.eval.limit,
            world=world,
        )
    except RdepError:
        raise
    except Exception as error:  # whatever failed, the run's own work is worth more than a measurement
        failure = f"{type(error).__name__}: {error}"
    # One rank may have failed after its last call of the model, and the others not: all must go the same way. Where it
    # failed before, the others wait for it in vain, and that is an RdepError.
    told = world.share("evaluation", failure.encode(errors="replace"))
    failures = [f"rank {rank}: {word.decode()}" for rank, word in enumerate(told) if word]
    if failures:
        first = failures[0] if world.size > 1 else failure
        reporter.message(f"The evaluation of {_named(suites)} failed, and training goes on: {first}")
        return None
    assert results is not None, "it did not fail"
    about = {"max_length": config.train.seq_len, "limit": config.eval.limit, "ranks": world.size}
    return dataclasses.replace(results, about=about)


def _named(suites: Sequence[Suite]) -> str:
    names = [task.name for suite in suites for task in suite.tasks]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
