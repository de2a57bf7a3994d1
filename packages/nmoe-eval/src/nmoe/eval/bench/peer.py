"""`python -m nmoe.eval.bench.peer BUNDLE`: choice tasks by the engine, and by lm-evaluation-harness.

The same model, exported and run by transformers; the same documents, with the harness's own templates, in which only
the data's place is replaced; the same shots. What is timed is from tokens to log-likelihoods on the host, and beside it
that with the prompts' encoding. All runs once before it is timed. Of the harness each batch size is timed, and the best
one of each task counts. Log-likelihoods are compared with the harness's softmax in fp32; it is timed with the one that
it has by default. lm-eval, transformers, accelerate and nmoe-data must be installed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nmoe.eval.bench.documents import write_documents
from nmoe.eval.bench.harness import Answered, Harness
from nmoe.eval.bench.setup import Setup, add_options, command_of, load_tokenizer, requests_of, setup_of, tokenizers
from nmoe.eval.choice import load_choice
from nmoe.eval.choice_tasks import choice_specs
from nmoe.eval.engine import Engine
from nmoe.eval.requests import ExampleResult, Tokenizer
from nmoe.eval.sources import Sources
from nmoe.kernels.bench.machine import versions
from nmoe.kernels.bench.results import header, write
from nmoe.model.hf import export_hf
from nmoe.model.transformer import Transformer


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.eval.bench.peer", description=__doc__)
    add_options(parser)
    names = ["arc_easy", "arc_easy:10", "boolq", "boolq:5", "copa", "winogrande"]
    parser.add_argument("--tasks", nargs="+", default=names, help="NAME or NAME:SHOTS")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[32, 128, 512], help="sequences at once in the harness"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="folder with room for the exported model")
    options = parser.parse_args(arguments)
    setup = setup_of(options)
    tokenizer = load_tokenizer(options.tokenizer)
    packages = versions(("transformers", "lm-eval", "accelerate"))
    results = header(command_of("nmoe.eval.bench.peer", options), setup.machine(), packages)
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        folder = Path(temporary)
        write_documents(options.bundle, folder / "data", options.limit)
        ours = _all_ours(setup, tokenizer, folder, options)
        if not setup.is_toy:
            torch.cuda.empty_cache()
        begun = time.perf_counter()
        harness = Harness(setup, folder / "model", folder / "data", options.max_length)
        results["harness"] = {"attention": harness.attention, "experts": harness.experts}
        print(f"loaded in {time.perf_counter() - begun:.1f} s, {results['harness']}", flush=True)
        results["tasks"] = {}
        for name, (measured, examples) in ours.items():
            results["tasks"][name] = measured | _theirs(harness, name, options.batches, measured, examples)
            print(name, results["tasks"][name], flush=True)
            write(results, options.output)  # what is measured stays, should this be ended early
    tasks = results["tasks"].values()
    mine, other = (sum(each[key] for each in tasks) for key in ("score_s", "harness_score_s"))
    results["total"] = {"score_s": round(mine, 3), "harness_score_s": round(other, 3), "ratio": round(other / mine, 2)}
    print("total", results["total"])
    write(results, options.output)
    return 0


def _all_ours(
    setup: Setup, tokenizer: Tokenizer, folder: Path, options: argparse.Namespace
) -> dict[str, tuple[dict[str, Any], list[ExampleResult]]]:
    """Exports the model, and measures the engine; the model is gone afterwards."""
    model = setup.build(options.vocab)
    begun = time.perf_counter()
    _export(model, tokenizer, folder / "model", setup.dtype, options.max_length)
    print(f"exported in {time.perf_counter() - begun:.1f} s", flush=True)
    engine = Engine(model, max_length=options.max_length, max_tokens=options.max_tokens)
    return {name: _ours(setup, engine, tokenizer, folder / "data", name) for name in options.tasks}


@torch.no_grad()
def _export(model: Transformer, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, length: int) -> None:
    """Writes the model for transformers; what it has in a wider dtype, the routers, is rounded before."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    written = tokenizers()
    export_hf(
        model.config,
        model.state(),
        folder,
        dtype=dtype,
        eos_id=tokenizer.eos_id,
        max_position_embeddings=length,
        extra_files={
            "tokenizer.json": written.tokenizer_json(tokenizer),
            "tokenizer_config.json": written.tokenizer_config(tokenizer, length),
        },
    )


def _ours(
    setup: Setup, engine: Engine, tokenizer: Tokenizer, data: Path, name: str
) -> tuple[dict[str, Any], list[ExampleResult]]:
    """What is measured of the engine, and its results."""
    label, _, shots = name.partition(":")
    (task,) = load_choice(choice_specs()[label], Sources((data,), hub=False), int(shots or 0)).tasks
    encode = partial(task.examples, tokenizer, limit=None, max_length=engine.max_length)
    engine.score(requests_of(encode()))
    examples, encoding, _ = setup.timed(encode)
    requests = requests_of(examples)
    scores, seconds, peak = setup.timed(partial(engine.score, requests))
    answers = iter(scores)
    results = [example.judge([next(answers) for _ in example.requests]) for example in examples]
    measured = {
        "documents": len(examples),
        "requests": len(requests),
        "tokens_unshared": sum(len(each.context) + len(each.continuation) - 1 for each in requests),
        "score_s": round(seconds, 4),
        "whole_s": round(seconds + encoding, 4),
        "peak_bytes": peak,
    }
    return measured, results


def _theirs(
    harness: Harness, name: str, batches: Sequence[int], ours: dict[str, Any], examples: Sequence[ExampleResult]
) -> dict[str, Any]:
    """What is measured of the harness, beside the engine."""
    exact = harness.run(name, batches[0], torch.float32)
    gaps = sorted(
        abs(a - b)
        for example, scores in zip(examples, exact.scores, strict=True)
        for a, b in zip(example.scores, scores, strict=True)
    )
    accuracy = sum(example.correct for example in examples) / len(examples)
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        timed = _second(harness, name, batch)
        if timed is not None:
            found[str(batch)] = {"score_s": round(timed.score_s, 4), "whole_s": round(timed.whole_s, 4)}
    best = min(found.values(), key=lambda each: each["score_s"])
    return {
        "accuracy": accuracy,
        "harness_accuracy": exact.accuracy,
        "same_pick": sum(
            example.pick == scores.index(max(scores)) for example, scores in zip(examples, exact.scores, strict=True)
        )
        / len(examples),
        "nats_apart_median": gaps[len(gaps) // 2],
        "nats_apart_most": gaps[-1],
        "harness_batches": found,
        "harness_score_s": best["score_s"],
        "ratio": round(best["score_s"] / ours["score_s"], 2),
        "ratio_with_encoding": round(best["whole_s"] / ours["whole_s"], 2),
    }


def _second(harness: Harness, name: str, batch: int) -> Answered | None:
    """The second of two runs; None where there is no memory for so many sequences."""
    try:
        harness.run(name, batch)
        return harness.run(name, batch)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # only now: what failed is no longer held by the error
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
