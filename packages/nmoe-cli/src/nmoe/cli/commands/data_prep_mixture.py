"""`n data prep-mixture`: every source of a mixture to token shards."""

import math
import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_summary, print_table
from nmoe.cli.context import Injected
from nmoe.cli.errors import UsageError


def prep_mixture(
    *,
    mixture: Annotated[Path, Parameter(help="The mixture's file.")],
    flow: Annotated[
        str | None, Parameter(help="Profile of token budgets; left out: every source is prepared whole.")
    ] = None,
    stage: Annotated[
        str | None, Parameter(help="Prepare the sources of this stage only; left out: of all stages.")
    ] = None,
    flow_profiles: Annotated[Path, Parameter(help="The file of the profiles.")] = Path("configs/flow_profiles.toml"),
    tokenizer: Annotated[
        str, Parameter(help="byte, gpt2, o200k_harmony, or a local .tiktoken file; the same as data.tokenizer.")
    ] = "byte",
    output: Annotated[
        Path | None,
        Parameter(help="Holds mixtures/; left out: where training looks for it, ${NMOE_DATA_PATH:-data}."),
    ] = None,
    workers: Annotated[
        int | None, Parameter(help="Processes that tokenize; changes nothing in the output. Left out: one a CPU.")
    ] = None,
    context: Injected,
) -> None:
    """Prepare the sources of a mixture that are not prepared yet, each as many tokens as the flow draws from it.

    Interrupted or killed, it goes on where it stopped when the same command is run again.
    """
    from nmoe.cli.mixtures import load_mixture, prepared_tokens, source_folder
    from nmoe.cli.plan_report import SOURCES_HEADER, source_rows
    from nmoe.cli.progress import notice_printer, prep_progress
    from nmoe.cli.units import format_count
    from nmoe.data.mixture import read_budgets
    from nmoe.data.plan import Plan, make_plan
    from nmoe.data.prep import prepare
    from nmoe.data.remote import Patience
    from nmoe.data.schema import DataConfig
    from nmoe.data.sources import open_source
    from nmoe.data.tokenizers import load_tokenizer
    from nmoe.data.workers import default_workers

    notice = notice_printer(context.console, context.error_console)
    if stage is not None and flow is None:
        raise UsageError("--stage needs --flow, which says how long the stages are")
    loaded, content = load_tokenizer(tokenizer), load_mixture(mixture, context.environ)
    root = context.data_root if output is None else output
    folders = {each.name: source_folder(each, mixture, flow, loaded.name, root) for each in content.source}
    budgets = None if flow is None else read_budgets(flow_profiles, flow, content)

    def planned() -> Plan:
        tokens = {name: prepared_tokens(folder) for name, folder in folders.items()}
        # With samples of one token, samples are tokens. All stages: a later one needs its part of a source too.
        return make_plan(content, tokens, 1, budgets=budgets)

    whole = planned()
    if stage is not None:
        whole.check_stage(stage)
    wanted = {draw.source for each in whole.stages if stage in (None, each.name) for draw in each.draws}
    for source in content.source:
        if source.name not in wanted:
            continue
        folder = folders[source.name]
        taken = next((total.tokens for total in whole.totals if total.source == source.name), None)
        if folder.exists():
            have = prepared_tokens(folder)
            told = ""
            if have is not None and taken is not None and have < taken:
                told = f", {format_count(have)} of {format_count(taken)} tokens: for more, remove it first"
            print_line(context.console, f"{source.name}: prepared already, in {folder}{told}")
            continue
        if not source.input:
            raise UsageError(
                f"{mixture}: source {source.name!r}: expected its path to be a prepared folder, found nothing at "
                f"{folder}: prepare it (n data prep), or add an input"
            )
        limit = None
        if budgets is not None and taken is not None:
            # Validation comes on top; it has its part of the documents, so that this is about as many tokens.
            limit = math.ceil(taken / (1 - content.val_fraction))
        opened = open_source(
            source.kind,
            list(source.input),
            text_key=source.text_key,
            config=source.config,
            split=source.split,
            revision=source.revision,
            patience=Patience(notice),
        )
        number = default_workers(opened.total) if workers is None else workers
        told = "whole" if limit is None else f"up to {format_count(limit)} tokens"
        print_line(context.console, f"{source.name}: reading {opened}, {told}, {number} worker{'s' * (number > 1)}")
        with prep_progress(context.console, limit) as progress:
            prepare(
                opened,
                loaded,
                folder,
                val_fraction=float(content.val_fraction),
                max_tokens=limit,
                workers=number,
                progress=progress,
                notice=notice,
            )
    print_table(context.console, SOURCES_HEADER, source_rows(planned()))
    keys = {"data.tokenizer": tokenizer, "data.mixture": mixture, "data.flow": flow, "data.stage": stage}
    if flow is not None and flow_profiles != DataConfig.model_fields["flow_profiles"].default:
        keys["data.flow_profiles"] = flow_profiles
    given = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in keys.items() if value is not None)
    where = "" if output is None else f"NMOE_DATA_PATH={output} "
    print_summary(
        context.console,
        f"Prepared {mixture}",
        [("sources", str(len(wanted)))],
        [f"{where}{context.command} data plan CONFIG {given}", f"{where}{context.command} train CONFIG {given}"],
    )
