"""`python -m nmoe.eval.bench BUNDLE`: CORE on a GPU by the engine, and one example at a time, of the same examples.

One example at a time is what the definition does: an example's prompts as one padded batch, whole logits, and the next
example after that. Both use the same kernels, and both read the same tokens, whose making is timed apart. Each is run
twice: the first time kernels are compiled and memory is taken, the second one counts. Then the engine's peak memory
with a head of another size, of the task that needed most.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from nmoe.eval.bench.setup import Setup, add_options, command_of, load_tokenizer, requests_of, setup_of
from nmoe.eval.core import load_core
from nmoe.eval.engine import Engine
from nmoe.eval.requests import Example, ScoreRequest
from nmoe.eval.sources import Sources
from nmoe.kernels.bench.machine import versions
from nmoe.kernels.bench.results import header, write
from nmoe.model.transformer import Transformer


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.eval.bench", description=__doc__)
    add_options(parser)
    parser.add_argument("--one-by-one", type=int, default=200, help="examples a task that are scored one at a time")
    parser.add_argument("--other-vocab", type=int, default=50_304, help="the peak of memory is measured of this too")
    options = parser.parse_args(arguments)
    setup = setup_of(options)
    tokenizer = load_tokenizer(options.tokenizer)
    suite = load_core(Sources((options.bundle,), allow_missing=True))
    model = setup.build(options.vocab)
    engine = Engine(model, max_length=options.max_length, max_tokens=options.max_tokens)
    results = header(command_of("nmoe.eval.bench", options), setup.machine(), versions(()))
    results["tasks"] = {}
    most: list[ScoreRequest] = []
    most_peak = -1
    for task in suite.tasks:
        begun = time.perf_counter()
        examples = task.examples(tokenizer, limit=options.limit, max_length=options.max_length)
        encoding = time.perf_counter() - begun
        requests = requests_of(examples)
        some = examples[: options.one_by_one]
        _, first, _ = setup.timed(partial(engine.score, requests))
        ours, seconds, peak = setup.timed(partial(engine.score, requests))
        _, plain_first, _ = setup.timed(partial(_one_by_one, model, some))
        plain, plain_seconds, plain_peak = setup.timed(partial(_one_by_one, model, some))
        off = sorted(abs(a.logprob - b) / a.n_tokens for a, (b, _) in zip(ours, plain, strict=False))
        if peak > most_peak:
            most, most_peak = requests, peak
        results["tasks"][task.name] = measured = {
            "examples": len(examples),
            "requests": len(requests),
            "tokens_unshared": sum(len(each.context) + len(each.continuation) - 1 for each in requests),
            "encoding_s": round(encoding, 3),
            "engine_s": round(seconds, 3),
            "engine_first_s": round(first, 3),
            "engine_peak_bytes": peak,
            "one_by_one_examples": len(some),
            "one_by_one_s": round(plain_seconds, 3),
            "one_by_one_first_s": round(plain_first, 3),
            "one_by_one_peak_bytes": plain_peak,
            "ratio": round(plain_seconds / len(some) / (seconds / len(examples)), 2),
            "nats_a_token_apart_median": off[len(off) // 2],
            "nats_a_token_apart_most": off[-1],
            "same_likeliest": sum(a.greedy == b for a, (_, b) in zip(ours, plain, strict=False)) / len(off),
        }
        print(task.name, measured, flush=True)
        write(results, options.output)  # what is measured stays, should this be ended early
    tasks = results["tasks"].values()
    whole = sum(each["one_by_one_s"] / each["one_by_one_examples"] * each["examples"] for each in tasks)
    ours_s, encoding_s = (sum(each[key] for each in tasks) for key in ("engine_s", "encoding_s"))
    results["total"] = {
        "engine_s": round(ours_s, 2),
        "encoding_s": round(encoding_s, 2),
        "one_by_one_s": round(whole, 2),
        "ratio": round(whole / ours_s, 2),
        "ratio_with_encoding": round((whole + encoding_s) / (ours_s + encoding_s), 2),
    }
    print("total", results["total"], flush=True)
    write(results, options.output)
    del model, engine
    peaks = {options.vocab: most_peak, options.other_vocab: _peak(setup, options.other_vocab, most, options)}
    results["engine_peak_bytes_by_vocabulary"] = {str(vocab): peak for vocab, peak in sorted(peaks.items())}
    print("engine_peak_bytes_by_vocabulary", results["engine_peak_bytes_by_vocabulary"])
    write(results, options.output)
    return 0


def _peak(setup: Setup, vocab: int, requests: Sequence[ScoreRequest], options: argparse.Namespace) -> int:
    """Bytes at most beside the weights, of the second of two runs."""
    engine = Engine(setup.build(vocab), max_length=options.max_length, max_tokens=options.max_tokens)
    engine.score(requests)
    return setup.timed(partial(engine.score, requests))[2]


@torch.no_grad()
def _one_by_one(model: Transformer, examples: Sequence[Example]) -> list[tuple[float, bool]]:
    """Log-probabilities and whether all is the likeliest, by a padded batch and whole logits an example."""
    found = []
    native = model.ops.tier == "native"
    for example in examples:
        requests = requests_of([example])
        rows = [[*each.context, *each.continuation] for each in requests]
        width = max(map(len, rows))
        token_BS1 = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.head.weight.device)
        input_BS = token_BS1[:, :-1]
        # As the engine does it: cuDNN would plan the shape of nearly every example anew.
        start_BS = torch.zeros_like(input_BS, dtype=torch.int32) if native else None
        logits_BSV = model.logits(input_BS, document_start_BS=start_BS)
        loss_BS = F.cross_entropy(logits_BSV.flatten(0, 1).float(), token_BS1[:, 1:].flatten(), reduction="none")
        loss_BS = loss_BS.view(input_BS.shape)
        likeliest_BS = logits_BSV.argmax(-1) == token_BS1[:, 1:]
        for number, (row, each) in enumerate(zip(rows, requests, strict=True)):
            own = slice(len(each.context) - 1, len(row) - 1)
            found.append((-float(loss_BS[number, own].sum()), bool(likeliest_BS[number, own].all())))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
