"""Autoregressive generation with a KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from nmoe.model.cache import Cache
from nmoe.model.errors import SamplingError
from nmoe.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the smallest set of likeliest tokens with at least this probability (arXiv:1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise SamplingError(
                f"expected temperature ≥ 0 and 0 < top_p ≤ 1, found {self.temperature} and {self.top_p}: "
                "use --temperature 0 for greedy decoding, --top-p 1 for all tokens"
            )


@torch.inference_mode()
def generate(
    model: Transformer, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling, eos_id: int | None, n_ids: int
) -> Iterator[int]:
    """Yields tokens after `prompt` until EOS (not yielded) or `max_tokens`.

    Args:
        model: in evaluation mode.
        prompt: token ids, at least one.
        max_tokens: bound on what is generated.
        sampling: temperature, nucleus and seed.
        eos_id: ends the text; None: only `max_tokens` does.
        n_ids: the tokenizer's ids; a padded vocabulary's rows beyond are never chosen.

    Raises:
        SamplingError: the prompt is empty or holds an id that the model lacks.
    """
    if not prompt or not all(0 <= token < model.config.vocab_size for token in prompt):
        raise SamplingError(
            f"expected a prompt of at least one token id below {model.config.vocab_size}, found {list(prompt)[:8]}"
        )
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = Cache(model.config.n_layers, len(prompt) + max_tokens)
    new = torch.tensor([list(prompt)], device=device)
    for _ in range(max_tokens):
        logits_V = model.logits(new, cache, last_only=True)[0, -1, :n_ids].float().cpu()
        token = _choose(logits_V, sampling, generator)
        if token == eos_id:
            return
        yield token
        new = torch.tensor([[token]], device=device)


def _choose(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probability_V, order_V = (logits_V / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    before_V = probability_V.cumsum(-1) - probability_V
    nucleus_V = probability_V.masked_fill(before_V >= sampling.top_p, 0.0)
    return int(order_V[torch.multinomial(nucleus_V, 1, generator=generator)])
