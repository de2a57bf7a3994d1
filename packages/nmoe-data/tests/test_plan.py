"""What a plan promises is what the loader's schedule takes."""

from collections import Counter
from decimal import Decimal

import pytest
from nmoe.data.errors import PlanError
from nmoe.data.mixture import Mixture, MixtureSource, MixtureStage
from nmoe.data.plan import make_plan

S = 10


def mixture(*stages, **changes):
    sources = tuple(
        MixtureSource(name=name, path=name, weight=Decimal(weight)) for name, weight in (("b", "0.75"), ("a", "0.25"))
    )
    return Mixture(source=sources, stage=stages, **changes)


ANNEAL = (MixtureStage(name="pretrain"), MixtureStage(name="anneal", weights={"a": Decimal(1)}))


def taken(plan):
    schedule = plan.schedule()
    source, _ = schedule.locate(0, schedule.n_samples)
    return Counter(plan.sources[k] for k in source.tolist())


def test_totals_are_what_is_taken():
    plan = make_plan(mixture(*ANNEAL), {"a": 101, "b": 1001}, S, budgets={"pretrain": 1239, "anneal": 400})
    assert plan.n_samples == 123 + 40
    assert taken(plan) == {total.source: total.samples for total in plan.totals}
    a, b = plan.totals
    assert (a.source, a.tokens, a.available) == ("a", a.samples * S, 101)
    assert a.epochs == pytest.approx(a.samples / 10)
    assert b.epochs == pytest.approx(b.samples / 100)
    assert a.warning == "repeats 7.1 times, more than 4"
    assert b.warning is None
    assert [draw.source for draw in plan.stages[1].draws] == ["a"]


def test_the_limit_on_repeats_is_the_sources_own_or_the_mixtures():
    budgets = {"pretrain": 1240}
    for limit, warned in ((Decimal(3), True), (Decimal(4), False)):
        plan = make_plan(mixture(max_epochs=limit), {"a": 101, "b": 1001}, S, budgets=budgets)
        assert (plan.totals[0].warning is not None) == warned


def test_what_is_not_prepared_is_said():
    plan = make_plan(mixture(), {"a": None, "b": 1001}, S, budgets={"pretrain": 1240})
    assert plan.totals[0].warning == "not prepared"
    assert plan.totals[0].epochs is None


def test_a_stage_alone_counts_what_came_before_it():
    tokens, budgets = {"a": 101, "b": 1001}, {"pretrain": 1239, "anneal": 400}
    whole = make_plan(mixture(*ANNEAL), tokens, S, budgets=budgets)
    alone = make_plan(mixture(*ANNEAL), tokens, S, budgets=budgets, stage="anneal")
    assert alone.n_samples == 40
    assert alone.totals == whole.totals
    first = make_plan(mixture(*ANNEAL), tokens, S, budgets=budgets, stage="pretrain")
    assert first.n_samples == 123
    assert len({str(plan.identity()) for plan in (whole, alone, first)}) == 3


def test_the_order_of_the_file_and_the_last_stages_length_do_not_matter():
    one = mixture(*ANNEAL)
    other = one.model_copy(update={"source": one.source[::-1]})
    tokens, budgets = {"a": 101, "b": 1001}, {"pretrain": 1239, "anneal": 400}
    plans = [
        make_plan(one, tokens, S, budgets=budgets),
        make_plan(other, tokens, S, budgets=budgets),
        make_plan(one, tokens, S, budgets=budgets | {"anneal": 999}),
    ]
    assert plans[0].identity() == plans[1].identity() == plans[2].identity()
    assert make_plan(one, tokens, S, budgets=budgets | {"pretrain": 999}).identity() != plans[0].identity()


def test_one_stage_without_a_flow_has_no_end():
    plan = make_plan(mixture(), {"a": 101, "b": 1001}, S, run_samples=80)
    assert plan.n_samples is None
    assert [draw.samples for draw in plan.stages[0].draws] == [20, 60]
    plan.check_length(10**15)


def test_impossible_plans_are_refused():
    tokens = {"a": 101, "b": 1001}
    with pytest.raises(PlanError, match="2 stages"):
        make_plan(mixture(*ANNEAL), tokens, S)
    with pytest.raises(PlanError, match=r"pretrain, anneal\), found 'fine'"):
        make_plan(mixture(*ANNEAL), tokens, S, budgets={"pretrain": 1239, "anneal": 400}, stage="fine")
    with pytest.raises(PlanError, match="stage 'anneal': expected at least 10 tokens"):
        make_plan(mixture(*ANNEAL), tokens, S, budgets={"pretrain": 1239, "anneal": 9})
    plan = make_plan(mixture(*ANNEAL), tokens, S, budgets={"pretrain": 1239, "anneal": 400})
    plan.check_length(163)
    with pytest.raises(PlanError, match=r"expected 164 samples .* found 163.* raise the flow's tokens of 'anneal'"):
        plan.check_length(164)
