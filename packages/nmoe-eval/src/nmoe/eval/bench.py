"""`python -m nmoe.eval.bench BUNDLE`: CORE on a GPU by the engine, and one example at a time, of the same examples.

The model has moonlet's shape and random weights: rates do not depend on what it knows. One example at a time is what
the definition does: an example's prompts as one padded batch, whole logits, and the next example after that. Both use
the same kernels, and both read the same tokens, whose making is timed apart. Tokenizers are nmoe-data's, which must be
installed beside this package.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nmoe.eval.core import load_core
from nmoe.eval.engine import Engine
from nmoe.eval.requests import Example, ScoreRequest
from nmoe.eval.sources import Sources
from nmoe.kernels.bench.machine import describe_gpu, versions
from nmoe.kernels.bench.results import header, write
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

MOONLET: dict[str, Any] = {
    "dim": 2048, "n_layers": 12, "n_dense_layers": 1, "n_heads": 16, "norm_eps": 1e-5, "attn": "mla",
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 50_000.0,
    "inter_dim": 11_264, "moe_inter_dim": 1408, "n_routed_experts": 64, "n_activated_experts": 6,
    "n_shared_experts": 2, "route_scale": 2.446,
}  # fmt: skip
"""`configs/moonlet.toml`, but for the vocabulary."""


def main(arguments: Sequence[str]) -> int:
    """Measures and prints; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.eval.bench", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokenizer", default="gpt2", help="as nmoe-data knows it")
    parser.add_argument("--vocab", type=int, default=201_088, help="rows of the head")
    parser.add_argument("--limit", type=int, default=200, help="examples a task")
    parser.add_argument("--one-by-one", type=int, default=200, help="examples a task that are scored one at a time")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=32_768)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args(arguments)
    tokenizer = import_module("nmoe.data.tokenizers").load_tokenizer(options.tokenizer)
    config = ModelConfig(vocab_size=options.vocab, **MOONLET)
    model = Transformer.build(
        config, select_ops("native", "cuda"), LocalTransport(), device="cuda", dtype=torch.bfloat16, seed=0
    ).eval()
    suite = load_core(Sources((options.bundle,), allow_missing=True))
    engine = Engine(model, max_length=options.max_length, max_tokens=options.max_tokens)
    # Kernels are compiled, and plans made, before anything is timed.
    warm = suite.tasks[0].examples(tokenizer, limit=8, max_length=options.max_length)
    engine.score(_requests(warm))
    _one_by_one(model, warm[:2])
    command = (
        f"python -m nmoe.eval.bench BUNDLE --tokenizer {options.tokenizer} --vocab {options.vocab} --limit "
        f"{options.limit} --one-by-one {options.one_by_one} --max-length {options.max_length} --max-tokens "
        f"{options.max_tokens}"
    )
    results = header(command, describe_gpu(), versions(()))
    results |= {"vocab": options.vocab, "limit": options.limit, "max_tokens": options.max_tokens, "tasks": {}}
    for task in suite.tasks:
        begun = time.perf_counter()
        examples = task.examples(tokenizer, limit=options.limit, max_length=options.max_length)
        encoding = time.perf_counter() - begun
        requests = _requests(examples)
        some = examples[: options.one_by_one]
        ours, seconds, peak = _timed(lambda given=requests: engine.score(given))  # type: ignore[misc]
        plain, plain_seconds, plain_peak = _timed(lambda given=some: _one_by_one(model, given))  # type: ignore[misc]
        off = sorted(abs(a.logprob - b) / a.n_tokens for a, (b, _) in zip(ours, plain, strict=False))
        results["tasks"][task.name] = measured = {
            "examples": len(examples),
            "requests": len(requests),
            "tokens_unshared": sum(len(each.context) + len(each.continuation) - 1 for each in requests),
            "encoding_s": round(encoding, 3),
            "engine_s": round(seconds, 3),
            "engine_peak_bytes": peak,
            "one_by_one_examples": len(some),
            "one_by_one_s": round(plain_seconds, 3),
            "one_by_one_peak_bytes": plain_peak,
            "ratio": round(plain_seconds / len(some) / (seconds / len(examples)), 2),
            "nats_a_token_apart_median": off[len(off) // 2],
            "nats_a_token_apart_most": off[-1],
        }
        print(task.name, measured, flush=True)
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
    print(results["total"])
    write(results, options.output)
    return 0


def _requests(examples: Sequence[Example]) -> list[ScoreRequest]:
    return [each for example in examples for each in example.requests if isinstance(each, ScoreRequest)]


def _timed(compute: Callable[[], Any]) -> tuple[Any, float, int]:
    """What it gives, seconds, and bytes at most beside what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated(), time.perf_counter()
    found = compute()
    torch.cuda.synchronize()
    return found, time.perf_counter() - begun, torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def _one_by_one(model: Transformer, examples: Sequence[Example]) -> list[tuple[float, bool]]:
    """Log-probabilities and whether all is the likeliest, by a padded batch and whole logits an example."""
    found = []
    for example in examples:
        requests = _requests([example])
        rows = [[*each.context, *each.continuation] for each in requests]
        width = max(map(len, rows))
        token_BS1 = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.head.weight.device)
        input_BS = token_BS1[:, :-1]
        # As the engine does it: cuDNN would plan the shape of nearly every example anew.
        start_BS = torch.zeros_like(input_BS, dtype=torch.int32)
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
