"""Whose turn it is: each prefix within one sample of the weights, from any place on at once."""

import random
from fractions import Fraction

import numpy as np
import pytest
from nmoe.data.errors import MixtureError
from nmoe.data.schedule import LONGEST_PERIOD, ROUNDED_PERIOD, Schedule, Shares, Span


def normalised(weights):
    total = sum(map(Fraction, weights.values()))
    return {name: Fraction(weight) / total for name, weight in weights.items()}


def random_weights(seed):
    draw = random.Random(seed)
    kind = draw.choice([lambda: draw.randint(1, 9), lambda: draw.randint(1, 999), lambda: draw.choice([1, 500])])
    return normalised({f"s{i}": kind() for i in range(draw.randint(1, 12))})


@pytest.mark.parametrize("seed", range(40))
def test_every_prefix_is_within_one_sample_of_the_weights(seed):
    weights = random_weights(seed)
    shares = Shares.of(weights)
    names = list(shares.counts)
    for k, name in enumerate(names):
        assert Fraction(shares.counts[name], shares.period) == weights[name]
        held = np.concatenate(([0], np.cumsum(shares.pattern == k)))
        # In whole numbers, so that nothing is rounded: |held − n·p/P| < 1.
        off = np.abs(held * shares.period - np.arange(shares.period + 1) * shares.counts[name])
        assert off.max() < shares.period
        assert held[-1] == shares.counts[name]


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 1}, {"a": 3, "b": 1}, {"b": 2, "a": 1, "c": 3}])
def test_small_patterns_do_not_clump(weights):
    shares = Shares.of(normalised(weights))
    names = list(shares.counts)
    for name, count in shares.counts.items():
        places = np.flatnonzero(shares.pattern == names.index(name))
        gaps = np.diff([*places, places[0] + shares.period])
        assert gaps.max() <= -(-shares.period // count) + 1


def test_weights_with_five_decimals_are_exact():
    weights = normalised({"a": "0.12345", "b": "0.87654", "c": "0.00001"})
    shares = Shares.of(weights)
    assert shares.period == 100_000
    assert shares.counts == {"a": 12_345, "b": 87_654, "c": 1}


def test_finer_weights_are_rounded_by_less_than_one_part():
    weights = normalised({name: Fraction(f"0.{digits}") for name, digits in [("a", "1234567"), ("b", "3"), ("c", "7")]})
    shares = Shares.of(weights)
    assert shares.period == ROUNDED_PERIOD
    assert sum(shares.counts.values()) == ROUNDED_PERIOD
    for name, weight in weights.items():
        assert abs(shares.counts[name] - weight * ROUNDED_PERIOD) < 1
    with pytest.raises(MixtureError, match="source 'tiny'"):
        Shares.of(normalised({"tiny": Fraction(1, 10**9), "large": 1}))
    assert LONGEST_PERIOD >= 100_000


def stages():
    return [
        Span(Shares.of(normalised({"a": 2, "b": 1})), 50),
        Span(Shares.of(normalised({"c": 1, "a": 4})), 37),
        Span(Shares.of(normalised({"b": 1, "c": 1})), None),
    ]


def test_samples_of_a_source_come_in_order_each_once_through_all_stages():
    source, index = Schedule(stages(), ["a", "b", "c"]).locate(0, 200)
    for k in range(3):
        assert np.array_equal(index[source == k], np.arange((source == k).sum()))
    assert set(source[:50]) == {0, 1}
    assert set(source[50:87]) == {0, 2}
    assert set(source[87:]) == {1, 2}


def test_any_place_is_found_at_once():
    schedule = Schedule(stages(), ["a", "b", "c"])
    source, index = schedule.locate(0, 400)
    draw = random.Random(1)
    for _ in range(100):
        first = draw.randrange(400)
        count = draw.randrange(400 - first)
        found = schedule.locate(first, count)
        assert np.array_equal(found[0], source[first : first + count])
        assert np.array_equal(found[1], index[first : first + count])


@pytest.mark.parametrize("start", [1, 2])
def test_a_stage_alone_goes_on_where_the_ones_before_it_end(start):
    whole = Schedule(stages(), ["a", "b", "c"]).locate(0, 200)
    first = (0, 50, 87)[start]
    alone = Schedule(stages(), ["a", "b", "c"], start).locate(0, 200 - first)
    assert all(np.array_equal(mine, all_[first:]) for mine, all_ in zip(alone, whole, strict=True))


def test_the_end_is_known():
    assert Schedule(stages(), ["a", "b", "c"]).n_samples is None
    assert Schedule(stages()[:2], ["a", "b", "c"]).n_samples == 87
    assert Schedule(stages()[:2], ["a", "b", "c"], 1).n_samples == 37


def test_far_in_counts_are_exact():
    shares = Shares.of(normalised({"a": "0.7", "b": "0.2", "c": "0.1"}))
    first = 10**15 + 7
    source, index = Schedule([Span(shares, None)], ["a", "b", "c"]).locate(first, 10)
    taken = shares.taken(first)
    assert sum(taken.values()) == first
    for k, name in enumerate("abc"):
        mine = index[source == k]
        assert mine.tolist() == list(range(taken[name], taken[name] + mine.size))
