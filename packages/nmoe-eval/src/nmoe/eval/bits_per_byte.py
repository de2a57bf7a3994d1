"""Bits per byte of text, which models of different tokenizers can be compared by.

The validation loss's figure (`nmoe.eval.validation`) has the cost of end-of-text tokens in it, and of a part of a set
it takes the bytes by their share. Here bytes are counted token by token, whatever part is scored, and what stands for
no byte is context, but not scored.

Shapes: B batch, S sequence, V ids.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from nmoe.eval.errors import EmptyValidationError
from nmoe.eval.validation import Batch, ValidationSet, bounded, validate
from nmoe.kernels.reference.cross_entropy import IGNORE
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World


@dataclass(frozen=True)
class BitsPerByte:
    """What a model makes of a text's bytes."""

    value: float
    """Bits a byte."""
    n_bytes: int
    """Scored."""
    n_tokens: int
    """Scored: those that stand for bytes."""


def bits_per_byte(
    model: Transformer,
    data: ValidationSet,
    token_bytes_V: npt.NDArray[np.integer],
    *,
    max_sequences: int | None = None,
    world: World | None = None,
) -> BitsPerByte:
    """Code length of a text over its bytes. Several ranks call it together and get the same figure.

    Args:
        model: in evaluation mode.
        data: the text; its own counts of tokens and bytes are not used.
        token_bytes_V: bytes that each id stands for; 0 for special tokens.
        max_sequences: only the first so many; the same text then, whatever the batch.
        world: the ranks; None: this one alone.

    Raises:
        EmptyValidationError: no token of the data stands for a byte.
    """
    counted = 0

    def batches() -> Iterator[Batch]:
        nonlocal counted
        for inputs_BS, targets_BS in bounded(data.batches(), max_sequences):
            bytes_BS = np.where(targets_BS == IGNORE, 0, token_bytes_V[np.maximum(targets_BS, 0)])
            counted += int(bytes_BS.sum())
            yield inputs_BS, np.where(bytes_BS > 0, targets_BS, IGNORE)

    # Every rank goes through all batches, whoever scores them: so all count all bytes.
    result = validate(model, replace(data, batches=batches, n_tokens=1, n_bytes=1), world=world)
    if counted == 0:
        raise EmptyValidationError("expected a text of at least one byte, found none: prepare one anew")
    return BitsPerByte(result.loss * result.n_tokens / math.log(2) / counted, counted, result.n_tokens)
