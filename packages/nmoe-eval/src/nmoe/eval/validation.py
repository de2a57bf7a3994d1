"""Validation loss and bits per byte, every token of a validation set scored once.

Shapes: B batch, S sequence.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from nmoe.eval.errors import EmptyValidationError
from nmoe.kernels.reference.cross_entropy import IGNORE
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World, alone

Batch = tuple[np.ndarray, np.ndarray]
"""int64 (B, S) inputs and targets; a target of -100 is not scored."""

Batches = Callable[[], Iterable[Batch]]
"""Opens the validation set anew."""


@dataclass(frozen=True)
class ValidationSet:
    """A validation set as the evaluator needs it."""

    batches: Batches
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of its text."""
    document_starts: Callable[[np.ndarray], np.ndarray] | None = None
    """Of inputs (B, S), for each position the first one of its document, int32 (B, S), before which attention sees
    nothing; None: it sees all."""


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
def validate(
    model: Transformer, data: ValidationSet, max_sequences: int | None = None, world: World | None = None
) -> ValidationResult:
    """Scores the set, or its first `max_sequences` sequences (their share of the bytes is then taken by tokens).

    Several ranks call it together and get the same result. They score batches in turn, each as many: where there are
    none left for a rank, it takes part without scoring anything, since the others may need its experts.

    Args:
        model: its training mode is left as it was; put it in evaluation mode first.
        data: what to score; the same on all ranks.
        max_sequences: bound for large sets; what is scored does not depend on the batch.
        world: the ranks; None: this one alone.

    Raises:
        EmptyValidationError: there is nothing to score.
    """
    device = model.head.weight.device
    world = alone(device) if world is None else world
    total, scored = torch.zeros((), dtype=torch.float64), 0
    for inputs_BS, targets_BS in _of_rank(bounded(data.batches(), max_sequences), world):
        documents = {}
        if data.document_starts is not None:
            documents["document_start_BS"] = torch.from_numpy(data.document_starts(inputs_BS)).to(device)
        nll = model.score(torch.from_numpy(inputs_BS).to(device), torch.from_numpy(targets_BS).to(device), **documents)
        total += nll.double().cpu()
        scored += int((targets_BS != IGNORE).sum())
    if world.size > 1:
        sums = torch.tensor([float(total), scored], dtype=torch.float64, device=device)
        world.sum_(sums)
        total, scored = sums[0].cpu(), int(sums[1])
    if scored == 0:
        raise EmptyValidationError("expected a validation set with at least one token, found none: prepare one anew")
    n_bytes = data.n_bytes * scored / data.n_tokens
    return ValidationResult(float(total) / scored, float(total) / math.log(2) / n_bytes, scored)


def bounded(batches: Iterable[Batch], max_sequences: int | None) -> Iterator[Batch]:
    """The first `max_sequences` sequences of the batches; None: all."""
    left = max_sequences
    for inputs_BS, targets_BS in batches:
        if left is None:
            yield inputs_BS, targets_BS
            continue
        yield inputs_BS[:left], targets_BS[:left]  # the rest of the batch is not scored
        left -= len(inputs_BS)
        if left <= 0:
            return


def _of_rank(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """This rank's of each W batches; of the last ones, where there is none for it, another's without targets."""
    several = iter(batches)
    while of_ranks := list(islice(several, world.size)):
        if world.rank < len(of_ranks):
            yield of_ranks[world.rank]
        else:
            inputs_BS, targets_BS = of_ranks[0]
            yield inputs_BS, np.full_like(targets_BS, IGNORE)
