"""A plan in rows for tables."""

from nmoe.cli.units import format_count
from nmoe.data.plan import Plan

Rows = list[tuple[str, ...]]
STAGES_HEADER = ("stage", "source", "weight", "samples", "tokens")
SOURCES_HEADER = ("source", "tokens", "prepared", "epochs", "")


def stage_rows(plan: Plan) -> Rows:
    """What each stage takes of each source, under `STAGES_HEADER`; of stages that other runs train, that they do."""
    rows: Rows = []
    for number, stage in enumerate(plan.stages):
        label = stage.name + (" (before)" if number < plan.start else "")
        for draw in stage.draws:
            weight = f"{float(draw.weight):.4%}" + ("" if draw.weight == draw.wanted else ", rounded")
            rows.append((label, draw.source, weight, f"{draw.samples:,}", format_count(draw.tokens)))
    return rows


def source_rows(plan: Plan) -> Rows:
    """What all stages take of each source, under `SOURCES_HEADER`."""
    return [
        (
            total.source,
            format_count(total.tokens),
            "-" if total.available is None else format_count(total.available),
            "-" if total.epochs is None else f"{total.epochs:.2f}",
            "" if total.warning is None else f"! {total.warning}",
        )
        for total in plan.totals
    ]
