"""Bits per byte against a plain count; the same text in another tokenizer's tokens has the same bytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nmoe.eval.bits_per_byte import bits_per_byte
from nmoe.eval.errors import EmptyValidationError
from nmoe.eval.validation import ValidationSet
from nmoe.rdep.world import World

LENGTH, EOS = 8, 20
TOKENS = np.random.default_rng(0).integers(0, EOS + 1, 45)
TOKENS[[5, 17, 40]] = EOS
BYTES = np.array([*np.random.default_rng(1).integers(1, 6, EOS), 0])


def windows():
    rows = -(-len(TOKENS) // LENGTH)
    targets, inputs = np.full(rows * LENGTH, -100), np.full(rows * LENGTH, EOS)
    targets[: len(TOKENS)], inputs[1 : len(TOKENS)] = TOKENS, TOKENS[:-1]
    return inputs.reshape(rows, LENGTH), targets.reshape(rows, LENGTH)


def text(size):
    inputs, targets = windows()
    starts = range(0, len(inputs), size)
    return ValidationSet(lambda: ((inputs[i : i + size], targets[i : i + size]) for i in starts), 7, 7)


def plain(model, rows):
    """Nats and bytes of all tokens that stand for bytes, one by one."""
    inputs, targets = windows()
    nats = n_bytes = n_tokens = 0
    with torch.no_grad():
        for x, y in list(zip(inputs, targets, strict=True))[:rows]:
            logits = model.logits(torch.from_numpy(x)[None])[0]
            for position, target in enumerate(y):
                if target not in (-100, EOS):
                    nats -= F.log_softmax(logits[position], -1)[target].item()
                    n_bytes, n_tokens = n_bytes + BYTES[target], n_tokens + 1
    return nats / math.log(2) / n_bytes, n_bytes, n_tokens


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_bytes_are_counted_token_by_token(model, size, rows):
    assert (TOKENS == EOS).sum() > 1
    result = bits_per_byte(model, text(size), BYTES, max_sequences=rows)
    value, n_bytes, n_tokens = plain(model, rows)
    assert result.value == pytest.approx(value, rel=1e-12)
    assert (result.n_bytes, result.n_tokens) == (n_bytes, n_tokens)


def test_a_tokenizer_of_longer_tokens_halves_the_figure_at_equal_loss(model):
    once, twice = bits_per_byte(model, text(2), BYTES), bits_per_byte(model, text(2), 2 * BYTES)
    assert twice.value == pytest.approx(once.value / 2, rel=1e-12)


def test_ranks_get_the_same_figure(model):
    class Rank(World):
        def __init__(self, rank, sums=None):
            super().__init__(rank, 2, torch.device("cpu"))
            self.sums = sums

        def sum_(self, tensor):
            self.given = tensor.clone()
            tensor.copy_(torch.ones(2) if self.sums is None else self.sums)

    given = []
    for rank in range(2):
        world = Rank(rank)
        bits_per_byte(model, text(2), BYTES, world=world)
        given.append(world.given)
    alone = bits_per_byte(model, text(2), BYTES)
    for rank in range(2):
        found = bits_per_byte(model, text(2), BYTES, world=Rank(rank, sum(given)))
        assert found.value == pytest.approx(alone.value, rel=1e-12)
        assert (found.n_bytes, found.n_tokens) == (alone.n_bytes, alone.n_tokens)


def test_a_text_without_bytes_is_an_error(model):
    with pytest.raises(EmptyValidationError):
        bits_per_byte(model, text(2), np.zeros(21, np.int64))
    with pytest.raises(EmptyValidationError):
        bits_per_byte(model, ValidationSet(lambda: iter(()), 0, 0), BYTES)
