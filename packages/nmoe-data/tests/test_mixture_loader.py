"""Batches of a mixture: a function of plan, seed and cursor, in the plan's proportions, from any place on."""

import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pytest
from nmoe.data.errors import ArgumentError, PlanError, TooFewTokensError
from nmoe.data.loader import Loader, mixture_fingerprint, rank_slice
from nmoe.data.mixture import Mixture, MixtureSource, MixtureStage
from nmoe.data.plan import make_plan

S = 4
SIZES = {"books": 61, "code": 401, "web": 1001}
WEIGHTS = {"books": "0.2", "code": "0.3", "web": "0.5"}
BUDGETS = {"pretrain": 1603, "anneal": 800}


def mixture(weights=WEIGHTS):
    sources = tuple(MixtureSource(name=name, path=name, weight=Decimal(weight)) for name, weight in weights.items())
    anneal = MixtureStage(name="anneal", weights={"books": Decimal(1), "code": Decimal(2)})
    return Mixture(source=sources, stage=(MixtureStage(name="pretrain"), anneal))


def plan_of(sizes=SIZES, budgets=BUDGETS, **options):
    return make_plan(mixture(), sizes, S, budgets=budgets, **options)


@pytest.fixture
def sets(token_set):
    """Three sets whose tokens tell their source (thousands) and place."""
    return {
        name: token_set(np.arange(size) + 2000 * k, borders=(size // 3, size // 2), name=name, n_vocab=6000)
        for k, (name, size) in enumerate(SIZES.items())
    }


@pytest.fixture
def loader(sets):
    return Loader.of_plan(plan_of(), sets, seed=1)


def test_each_source_is_gone_through_epoch_by_epoch_in_the_plans_proportions(loader):
    batch = loader.batch(0, loader.n_samples)
    assert np.array_equal(batch, batch[:, :1] + np.arange(S + 1))
    source, sample = batch[:, 0] // 2000, batch[:, 0] % 2000 // S
    planned = {total.source: total.samples for total in plan_of().totals}
    assert Counter(source.tolist()) == Counter({k: planned[name] for k, name in enumerate(SIZES)})
    for k, size in enumerate(SIZES.values()):
        mine, per_epoch = sample[source == k], (size - 1) // S
        for epoch in range(0, mine.size - per_epoch + 1, per_epoch):
            assert sorted(mine[epoch : epoch + per_epoch]) == list(range(per_epoch))
        assert not np.array_equal(mine[:per_epoch], np.arange(per_epoch)[: mine.size])
    for n in range(0, 401, 7):  # every prefix of the first stage
        for k, weight in enumerate(WEIGHTS.values()):
            assert abs((source[:n] == k).sum() - n * float(weight)) < 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_ranks_and_threads_see_one_global_order(sets, loader, world, threads):
    batch_size, steps = 8, 70
    expected = loader.batch(0, batch_size * steps)

    def ask(asked):
        step, rank, micro = asked
        start, count = rank_slice(step * batch_size, batch_size, rank, world)
        return mine.batch(start + micro, min(2, count))

    asked = [(step, rank, micro) for step in range(steps) for rank in range(world) for micro in range(0, 8 // world, 2)]
    mine = Loader.of_plan(plan_of(), sets, seed=1)
    with ThreadPoolExecutor(threads) as pool:
        got = np.concatenate(list(pool.map(ask, asked)))
    assert np.array_equal(got, expected)


def test_a_batch_depends_on_its_cursor_alone(sets, loader):
    whole = loader.batch(0, loader.n_samples)
    draw = np.random.default_rng(0)
    for _ in range(60):
        cursor = int(draw.integers(0, loader.n_samples))
        count = int(draw.integers(0, loader.n_samples - cursor + 1))
        assert np.array_equal(loader.batch(cursor, count), whole[cursor : cursor + count])
    assert np.array_equal(Loader.of_plan(plan_of(), sets, seed=1).batch(399, 3), whole[399:402])
    assert not np.array_equal(Loader.of_plan(plan_of(), sets, seed=2).batch(0, 50), whole[:50])


def test_another_process_gets_the_same(sets, loader):
    program = f"""
from pathlib import Path
from nmoe.data.loader import Loader
from nmoe.data.shards import ShardSet
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tests", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
sets = {{name: ShardSet.open(Path({str(next(iter(sets.values())).path.parent)!r}) / name) for name in tests.SIZES}}
print(Loader.of_plan(tests.plan_of(), sets, seed=1).batch(390, 20).tolist())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(loader.batch(390, 20).tolist())


def test_a_stage_alone_gives_what_the_whole_gives_there(sets, loader):
    alone = Loader.of_plan(plan_of(stage="anneal"), sets, seed=1)
    assert alone.n_samples == 200
    assert np.array_equal(alone.batch(0, 200), loader.batch(400, 200))
    assert alone.fingerprint != loader.fingerprint


def test_beyond_the_plan_there_is_nothing(loader):
    assert loader.batch(599, 1).shape == (1, S + 1)
    with pytest.raises(PlanError, match="samples under the plan's 600, found 600"):
        loader.batch(599, 2)


def test_the_fingerprint_follows_tokens_names_weights_and_stages(sets, token_set):
    plan = plan_of()
    fingerprints = [
        mixture_fingerprint(plan, sets),
        mixture_fingerprint(plan, {**sets, "web": sets["code"]}),
        mixture_fingerprint(plan_of(budgets=BUDGETS | {"pretrain": 1604 + S}), sets),
        mixture_fingerprint(
            make_plan(mixture(WEIGHTS | {"web": "0.6"}), SIZES, S, budgets=BUDGETS),
            sets,
        ),
    ]
    assert len(set(fingerprints)) == 4
    assert mixture_fingerprint(plan_of(budgets=BUDGETS | {"anneal": 4000}), sets) == fingerprints[0]


def test_every_source_must_be_there_and_hold_a_sample(sets, token_set):
    with pytest.raises(ArgumentError, match="books"):
        Loader.of_plan(plan_of(), {name: sets[name] for name in ("code", "web")}, seed=1)
    short = token_set(np.arange(S), name="short")
    with pytest.raises(TooFewTokensError, match="short"):
        Loader.of_plan(plan_of(), {**sets, "books": short}, seed=1)


def test_resuming_far_in_is_quick_and_exact(sets):
    far = 10**11
    endless = Mixture(source=mixture().source)
    plan = make_plan(endless, SIZES, S)
    begun = time.perf_counter()
    batch = Loader.of_plan(plan, sets, seed=1).batch(far, 8)
    single = Loader(sets["web"], S, seed=1).batch(far, 8)
    assert time.perf_counter() - begun < 1
    assert np.array_equal(batch[3:], Loader.of_plan(plan, sets, seed=1).batch(far + 3, 5))
    assert np.array_equal(single[3:], Loader(sets["web"], S, seed=1).batch(far + 3, 5))
