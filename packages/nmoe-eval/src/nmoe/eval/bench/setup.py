"""What the benches measure on: a model with random weights, a clock, the machine in words."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from nmoe.eval.requests import Example, ScoreRequest, Tokenizer
from nmoe.kernels.bench.machine import describe_gpu
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

Found = TypeVar("Found")

# The weights' spread is wider than moonlet's, so that log-likelihoods differ enough to be compared.
_MOONLET: dict[str, Any] = {
    "dim": 2048, "n_layers": 12, "n_dense_layers": 1, "n_heads": 16, "norm_eps": 1e-5, "init_std": 0.02, "attn": "mla",
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 50_000.0,
    "inter_dim": 11_264, "moe_inter_dim": 1408, "n_routed_experts": 64, "n_activated_experts": 6,
    "n_shared_experts": 2, "route_scale": 2.446,
}  # fmt: skip
_TOY: dict[str, Any] = _MOONLET | {
    "dim": 32, "n_layers": 2, "n_heads": 2, "init_std": 0.2, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "inter_dim": 48, "moe_inter_dim": 16, "n_routed_experts": 8,
    "n_activated_experts": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A model's shape, and where and how it is computed."""

    shape: dict[str, Any]
    device: str
    dtype: torch.dtype

    @property
    def is_toy(self) -> bool:
        """Whether figures mean nothing."""
        return self.device == "cpu"

    def build(self, vocab: int) -> Transformer:
        """The model with random weights."""
        ops = select_ops("reference" if self.is_toy else "native", self.device)
        config = ModelConfig(vocab_size=vocab, **self.shape)
        return Transformer.build(config, ops, LocalTransport(), device=self.device, dtype=self.dtype, seed=0).eval()

    def machine(self) -> dict[str, Any]:
        """For a result's head."""
        return {"toy": True} if self.is_toy else describe_gpu()

    def timed(self, compute: Callable[[], Found]) -> tuple[Found, float, int]:
        """What it gives, seconds, and bytes on the GPU at most, beside what was there before."""
        if self.is_toy:
            begun = time.perf_counter()
            return compute(), time.perf_counter() - begun, 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begun = torch.cuda.memory_allocated(), time.perf_counter()
        found = compute()
        torch.cuda.synchronize()
        return found, time.perf_counter() - begun, torch.cuda.max_memory_allocated() - before


MOONLET = Setup(_MOONLET, "cuda", torch.bfloat16)
"""`configs/moonlet.toml` but for the vocabulary, in bf16 with native kernels: rates do not depend on what it knows."""
TOY = Setup(_TOY, "cpu", torch.float32)
"""On a CPU, to see that a command works."""


def add_options(parser: ArgumentParser) -> None:
    """What all benches are asked."""
    parser.add_argument("bundle", type=Path, help="folder of an evaluation bundle")
    parser.add_argument("--tokenizer", default="gpt2", help="as nmoe-data knows it; that package must be installed")
    parser.add_argument("--vocab", type=int, default=201_088, help="rows of the head")
    parser.add_argument("--limit", type=int, default=200, help="examples a task")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens that the model sees")
    parser.add_argument("--max-tokens", type=int, default=32_768, help="of a forward call")
    parser.add_argument("--layers", type=int, default=12, help="of moonlet's: fewer to try the command")
    parser.add_argument("--toy", action="store_true", help="a toy model on the CPU, to see that the command works")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")


def setup_of(options: Namespace) -> Setup:
    """What was asked for."""
    return TOY if options.toy else replace(MOONLET, shape=MOONLET.shape | {"n_layers": options.layers})


def command_of(module: str, options: Namespace) -> str:
    """The command with every option but paths."""
    words = [f"python -m {module} BUNDLE"]
    for name, value in vars(options).items():
        if isinstance(value, Path) or value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def tokenizers() -> Any:
    """nmoe-data's module: a package beside this one, which nothing but the benches needs."""
    return import_module("nmoe.data.tokenizers")


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by its name."""
    tokenizer: Tokenizer = tokenizers().load_tokenizer(name)
    return tokenizer


def requests_of(examples: Sequence[Example]) -> list[ScoreRequest]:
    """All of the examples' requests."""
    return [each for example in examples for each in example.requests if isinstance(each, ScoreRequest)]
