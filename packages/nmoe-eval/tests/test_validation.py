"""Loss and bits per byte against a plain count, on a small model and made-up tokens."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nmoe.eval.errors import EmptyValidationError
from nmoe.eval.schema import EvalConfig
from nmoe.eval.validation import ValidationSet, validate
from nmoe.model.transformer import Transformer
from nmoe.rdep.world import World

LENGTH, EOS = 8, 20
TOKENS = np.random.default_rng(0).integers(0, EOS, 45)


def windows(tokens=TOKENS):
    """Every token a target once; the padding behind the last is not scored."""
    rows = -(-len(tokens) // LENGTH)
    targets = np.full(rows * LENGTH, -100)
    targets[: len(tokens)] = tokens
    inputs = np.full(rows * LENGTH, EOS)
    inputs[1 : len(tokens)] = tokens[:-1]
    return inputs.reshape(rows, LENGTH), targets.reshape(rows, LENGTH)


def in_batches(size, tokens=TOKENS, n_bytes=100):
    inputs, targets = windows(tokens)

    def batches():
        for start in range(0, len(inputs), size):
            yield inputs[start : start + size], targets[start : start + size]

    return ValidationSet(batches, len(tokens), n_bytes)


def plain_nll(model, rows=None):
    """Sum of nats over scored targets, window by window, token by token."""
    inputs, targets = windows()
    total = 0.0
    for row, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        if rows is not None and row >= rows:
            break
        logits = model.logits(torch.from_numpy(x)[None])[0]
        for position, target in enumerate(y):
            if target != -100:
                total -= F.log_softmax(logits[position], -1)[target].item()
    return total


def test_every_token_is_scored_once(model):
    result = validate(model, in_batches(4))
    assert result.n_tokens == len(TOKENS)
    assert result.loss == pytest.approx(plain_nll(model) / len(TOKENS), rel=1e-12)


def test_bits_per_byte_is_the_whole_code_length_over_the_bytes(model):
    result = validate(model, in_batches(4, n_bytes=173))
    assert result.bpb == pytest.approx(plain_nll(model) / math.log(2) / 173, rel=1e-12)
    assert result.tags() == {"val/loss": result.loss, "val/bpb": result.bpb}


@pytest.mark.parametrize("size", [1, 3, 6, 100])
def test_the_batch_changes_nothing(model, size):
    assert validate(model, in_batches(size)).loss == pytest.approx(validate(model, in_batches(2)).loss, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_bound_scores_the_first_sequences_whatever_the_batch(model, size):
    result = validate(model, in_batches(size), max_sequences=3)
    assert result.n_tokens == 3 * LENGTH
    assert result.loss == pytest.approx(plain_nll(model, rows=3) / (3 * LENGTH), rel=1e-12)
    share = 100 * 3 * LENGTH / len(TOKENS)
    assert result.bpb == pytest.approx(plain_nll(model, rows=3) / math.log(2) / share, rel=1e-12)


class Rank(World):
    """A rank that is here alone: it notes what it gives to a sum, and gets the sum of all, once that is known."""

    def __init__(self, rank, size, others=None):
        super().__init__(rank, size, torch.device("cpu"))
        self.given, self.others = None, others

    def sum_(self, tensor):
        self.given = tensor.clone()
        if self.others is not None:
            tensor.copy_(self.others)


@pytest.mark.parametrize("limit", [None, 1, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_score_every_token_once_in_as_many_calls_and_agree(model, monkeypatch, size, batch, limit):
    calls, data, score = [], in_batches(batch), Transformer.score

    def counted(self, inputs, targets):
        calls[-1] += 1
        assert len(inputs) > 0
        return score(self, inputs, targets)

    monkeypatch.setattr(Transformer, "score", counted)
    calls.append(0)
    alone = validate(model, data, limit)
    sequences = 6 if limit is None else limit
    n_batches = -(-sequences // batch)
    assert calls.pop() == n_batches
    given = []
    for rank in range(size):
        world = Rank(rank, size, torch.ones(2, dtype=torch.float64))
        calls.append(0)
        validate(model, data, limit, world)
        given.append(world.given)
    assert calls == [-(-n_batches // size)] * size, "a rank that calls less often would keep the others waiting"
    assert int(sum(given)[1]) == alone.n_tokens
    found = [validate(model, data, limit, Rank(rank, size, sum(given))) for rank in range(size)]
    assert all(result == found[0] for result in found)
    assert found[0].loss == pytest.approx(alone.loss, rel=1e-12)
    assert found[0].bpb == pytest.approx(alone.bpb, rel=1e-12)


def test_documents_are_those_that_the_set_tells(model, monkeypatch):
    """Each batch is scored within the documents of its own inputs."""
    seen, score = [], type(model).score

    def noted(self, inputs, targets, *, document_start_BS=None):
        seen.append((inputs, document_start_BS))
        return score(self, inputs, targets, document_start_BS=document_start_BS)

    monkeypatch.setattr(type(model), "score", noted)

    def starts(inputs):
        return np.tile(np.arange(inputs.shape[1], dtype=np.int32), (len(inputs), 1))  # every token its own document

    whole = in_batches(2)
    alone = validate(model, dataclasses.replace(whole, document_starts=starts))
    assert all(torch.equal(torch.from_numpy(starts(inputs.numpy())), found) for inputs, found in seen)
    assert alone.n_tokens == validate(model, whole).n_tokens
    assert alone.loss != validate(model, whole).loss


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(EmptyValidationError, match="at least one token"):
        validate(model, ValidationSet(lambda: iter(()), 0, 0))


def test_no_gradient_is_kept_and_the_mode_stays(model):
    validate(model, in_batches(2))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_schema_imports_no_torch():
    code = "import sys, nmoe.eval.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert EvalConfig().tasks == ("validation",)
