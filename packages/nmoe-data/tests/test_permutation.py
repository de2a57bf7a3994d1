"""The order is a permutation, drawn from its key, that costs no memory."""

import random
import tracemalloc

import numpy as np
import pytest
from nmoe.data.permutation import permute


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4097, 65_535, 65_537])
@pytest.mark.parametrize("key", [(0, 0, None), (7, 3, "web")])
def test_it_is_one_to_one(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, *key)), np.arange(size))


def test_each_part_of_the_key_matters():
    keys = [(seed, epoch, source) for seed in (0, 1) for epoch in (0, 1) for source in (None, "a", "b", "ab")]
    orders = {tuple(permute(np.arange(1000), 1000, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_a_place_does_not_depend_on_what_else_is_asked():
    size = 10**12 + 39
    draw = random.Random(0)
    places = np.array([draw.randrange(size) for _ in range(200)])
    together = permute(places, size, seed=5, epoch=2)
    assert together.tolist() == [int(permute(places[i : i + 1], size, 5, 2)[0]) for i in range(200)]
    assert together.min() >= 0
    assert together.max() < size
    assert np.unique(together).size == 200


def test_a_trillion_samples_take_no_memory():
    permute(np.arange(8), 10**12, 0, 0)
    tracemalloc.start()
    try:
        for place in range(0, 10**12, 10**10):
            permute(np.arange(place, place + 8), 10**12, 0, place)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
