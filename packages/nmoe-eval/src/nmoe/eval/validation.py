"""Validation loss and bits per byte, every token of a validation set scored once.

Shapes: B batch, S sequence.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from nmoe.eval.errors import EmptyValidationError
from nmoe.kernels.reference.cross_entropy import IGNORE
from nmoe.model.transformer import Transformer

Batches = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Opens the validation set anew: pairs of int64 (B, S) inputs and targets; a target of -100 is not scored."""


@dataclass(frozen=True)
class ValidationSet:
    """A validation set as the evaluator needs it."""

    batches: Batches
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of its text."""


@dataclass(frozen=True)
class ValidationResult:
    """What a model makes of a validation set."""

    loss: float
    """Nats a token, end-of-text tokens included."""
    bpb: float
    """Bits a byte of text: the whole code length, end-of-text tokens included, over the bytes alone."""
    n_tokens: int
    """Scored targets."""

    def tags(self) -> dict[str, float]:
        """As metrics: `val/loss`, `val/bpb`."""
        return {"val/loss": self.loss, "val/bpb": self.bpb}


@torch.no_grad()
def validate(model: Transformer, data: ValidationSet, max_sequences: int | None = None) -> ValidationResult:
    """Scores the set, or its first `max_sequences` sequences (their share of the bytes is then taken by tokens).

    Args:
        model: its training mode is left as it was; put it in evaluation mode first.
        data: what to score.
        max_sequences: bound for large sets; what is scored does not depend on the batch.

    Raises:
        EmptyValidationError: there is nothing to score.
    """
    device = model.head.weight.device
    total, scored = torch.zeros((), dtype=torch.float64), 0
    left = max_sequences
    for inputs_BS, targets_BS in data.batches():
        if left is not None:
            inputs_BS, targets_BS = inputs_BS[:left], targets_BS[:left]  # noqa: PLW2901 - the rest of the batch is not scored
            left -= len(inputs_BS)
        nll = model.score(torch.from_numpy(inputs_BS).to(device), torch.from_numpy(targets_BS).to(device))
        total += nll.double().cpu()
        scored += int((targets_BS != IGNORE).sum())
        if left == 0:
            break
    if scored == 0:
        raise EmptyValidationError("expected a validation set with at least one token, found none: prepare one anew")
    n_bytes = data.n_bytes * scored / data.n_tokens
    return ValidationResult(float(total) / scored, float(total) / math.log(2) / n_bytes, scored)
