import itertools
import time

import numpy as np
import pytest
from nmoe.data.errors import ArgumentError, TokenRangeError, TooFewTokensError
from nmoe.data.loader import IGNORE_INDEX, Loader, rank_slice, validation_batches
from nmoe.data.permutation import permute


@pytest.fixture
def numbered(token_set):
    """Makes a set whose token i is i: what a batch holds tells where it came from. Shards of uneven length."""
    made = itertools.count()

    def make(n_tokens, borders=()):
        return token_set(np.arange(n_tokens), borders, name=f"numbered{next(made)}")

    return make


def samples(loader, cursor, count, seq_len):
    """Sample numbers, after checking that each row is consecutive tokens from a sample's start."""
    rows = loader.batch(cursor, count)
    assert rows.dtype == np.int64
    assert rows.shape == (count, seq_len + 1)
    assert np.array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
    assert not (rows[:, 0] % seq_len).any()
    return rows[:, 0] // seq_len


@pytest.mark.parametrize("n_samples", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100, 1000])
def test_an_epoch_holds_each_sample_once(numbered, n_samples):
    seq_len = 3
    for extra in (1, 3):
        shards = numbered(n_samples * seq_len + extra, borders=(2, 2 + n_samples))
        loader = Loader(shards, seq_len, seed=1)
        assert loader.samples_per_epoch == n_samples
        for epoch in range(3):
            order = samples(loader, epoch * n_samples, n_samples, seq_len)
            assert sorted(order) == list(range(n_samples))


def test_every_token_but_the_first_is_a_target_once_an_epoch(numbered):
    loader = Loader(numbered(101), 10, seed=0)
    targets = loader.batch(0, loader.samples_per_epoch)[:, 1:]
    assert sorted(targets.ravel()) == list(range(1, 101))


def test_a_batch_depends_on_its_cursor_alone(numbered):
    shards = numbered(1003, borders=(100, 350))
    loader = Loader(shards, 4, seed=5)
    n = loader.samples_per_epoch
    whole = loader.batch(0, 3 * n)
    draw = np.random.default_rng(0)
    for _ in range(50):
        cursor = int(draw.integers(0, 3 * n))
        count = int(draw.integers(0, 3 * n - cursor + 1))
        assert np.array_equal(loader.batch(cursor, count), whole[cursor : cursor + count])
    assert np.array_equal(Loader(shards, 4, seed=5).batch(n - 3, 6), whole[n - 3 : n + 3])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_see_one_global_order(numbered, world):
    loader = Loader(numbered(997), 3, seed=2)
    batch_size, steps = 8, 100
    expected = loader.batch(0, batch_size * steps)
    got = []
    for step in range(steps):
        for rank in range(world):
            start, count = rank_slice(step * batch_size, batch_size, rank, world)
            got += [loader.batch(start + micro, 2) for micro in range(0, count, 2)]
    assert np.array_equal(np.concatenate(got), expected)


def test_epochs_and_seeds_have_orders_of_their_own(numbered):
    shards, n = numbered(1001), 500
    orders = {tuple(samples(Loader(shards, 2, seed), epoch * n, n, 2)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(n)) not in orders


@pytest.mark.parametrize("size", [5, 12, 64])
def test_orders_are_as_good_as_random(size):
    """Over many epochs each sample comes equally often at each place: chi-squared within 6 standard deviations."""
    epochs = 3000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, seed=0, epoch=epoch)] += 1
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 6 * (2 * freedom) ** 0.5


def test_neighbours_are_scattered():
    """Places of neighbouring samples are uncorrelated: within 6 standard errors."""
    size = 100_003
    order = permute(np.arange(size), size, seed=3, epoch=0).astype(float)
    for lag in (1, 2, 3, 64, 1024):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 6 / size**0.5


def test_the_order_is_fixed_for_ever():
    """A change here reorders the data of every run that resumes."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [0, 5, 1, 8, 6, 4, 9, 7, 3, 2]
    assert permute(np.array([0, 1, 2, 10**12]), 10**12 + 7, seed=42, epoch=3).tolist() == [
        796069292274,
        762358361054,
        786648135792,
        221154179982,
    ]


def test_a_batch_is_quick(byte_set):
    shards = byte_set(["some text of no great interest " * 100] * 130, shard_tokens=1 << 27)
    loader = Loader(shards, 256, seed=0)
    loader.batch(0, 16)
    best = float("inf")
    for cursor in range(0, 1600, 16):
        start = time.perf_counter()
        loader.batch(cursor, 16)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_too_few_tokens_are_refused(numbered):
    assert Loader(numbered(11), 10, 0).samples_per_epoch == 1
    with pytest.raises(TooFewTokensError, match="11 tokens"):
        Loader(numbered(10), 10, 0)


def test_impossible_arguments_are_refused(numbered):
    with pytest.raises(ArgumentError, match="seq_len"):
        Loader(numbered(10), 0, 0)
    for cursor, count in ((-1, 1), (0, -1)):
        with pytest.raises(ArgumentError, match="cursor"):
            Loader(numbered(10), 2, 0).batch(cursor, count)
    for rank, world, batch in ((0, 0, 8), (2, 2, 8), (-1, 2, 8), (0, 3, 8), (0, 1, 0)):
        with pytest.raises(ArgumentError, match="rank"):
            rank_slice(0, batch, rank, world)


def test_foreign_token_ids_are_refused_by_file(token_set):
    shards = token_set(np.arange(40), borders=(10,), n_vocab=39)
    loader = Loader(shards, 39, 0)
    with pytest.raises(TokenRangeError, match=r"shard_00001\.npy: expected token ids under 39, found 39"):
        loader.batch(0, 1)


def test_fingerprint_is_that_of_the_set(byte_set):
    shards = byte_set(["some text"])
    assert Loader(shards, 4, 0).fingerprint == shards.fingerprint


@pytest.mark.parametrize("seq_len", [1, 3, 8, 100])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_validation_scores_every_token_once(byte_set, seq_len, batch):
    texts = ["first", "a second document", "", "żółw " * 9]
    shards = byte_set(texts, name=f"{seq_len}-{batch}")
    stream = shards.tokens(0, shards.n_tokens).astype(np.int64)
    pairs = list(validation_batches(shards, seq_len, batch))
    for inputs, targets in pairs:
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == seq_len
        assert 1 <= inputs.shape[0] <= batch
        assert inputs.dtype == targets.dtype == np.int64
    assert all(inputs.shape[0] == batch for inputs, _ in pairs[:-1])
    inputs = np.concatenate([inputs.ravel() for inputs, _ in pairs])
    targets = np.concatenate([targets.ravel() for _, targets in pairs])
    real = targets != IGNORE_INDEX
    assert np.array_equal(targets[real], stream)
    assert np.array_equal(inputs[real], [256, *stream[:-1]])
    assert not real[stream.size :].any()
    assert (inputs[~real] == 256).all()
    assert targets.size - stream.size < seq_len


@pytest.mark.parametrize(("seq_len", "batch"), [(0, 1), (1, 0)])
def test_validation_arguments_are_checked_at_once(byte_set, seq_len, batch):
    with pytest.raises(ArgumentError):
        validation_batches(byte_set(["x"]), seq_len, batch)
