"""`n data plan`: what a training run draws from each source, before anything runs."""

from pathlib import Path

from nmoe.cli.console import print_line, print_summary, print_table
from nmoe.cli.context import Injected
from nmoe.cli.options import ConfigFile, Sets


def plan(config: ConfigFile, /, *, sets: Sets = (), context: Injected) -> None:
    """Show what a configuration's run draws from each source: weights, tokens, epochs, and what repeats too often.

    Nothing is written, and sources need not be prepared.
    """
    from nmoe.cli.config import load_config
    from nmoe.cli.plan_report import SOURCES_HEADER, STAGES_HEADER, source_rows, stage_rows
    from nmoe.cli.run_data import plan_data, prep_mixture_command
    from nmoe.cli.units import format_count

    run = load_config(Path(config), sets, environ=context.environ).config
    wanted = run.train.steps * run.train.batch_size
    planned = plan_data(run.data, run.train.seq_len, context, run_samples=wanted)
    console, given = context.console, planned.n_samples
    print_table(console, STAGES_HEADER, stage_rows(planned))
    print_line(console, "")
    print_table(console, SOURCES_HEADER, source_rows(planned))
    print_line(console, "")
    length = f"{run.train.steps:,} steps, {wanted:,} samples, {format_count(wanted * run.train.seq_len)} tokens"
    rows = [("the run", length)]
    if given is not None:
        rows.append(("the plan", f"{given:,} samples, {format_count(given * run.train.seq_len)} tokens"))
    steps = []
    if run.data.mixture is not None and any(total.available is None for total in planned.totals):
        steps.append(f"{context.command} {prep_mixture_command(run.data)}")
    print_summary(console, f"Plan of {config}", rows, steps)
    planned.check_length(wanted)
