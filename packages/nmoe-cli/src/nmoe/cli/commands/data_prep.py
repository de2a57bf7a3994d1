"""`n data prep`: text to token shards."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_summary
from nmoe.cli.context import Injected
from nmoe.cli.errors import UsageError


def prep(
    inputs: Annotated[
        tuple[str, ...],
        Parameter(
            help="Files, folders, globs or http(s) addresses; with --source hf a dataset.",
            negative="",
            show_default=False,
        ),
    ] = (),
    /,
    *,
    input: Annotated[
        tuple[str, ...],
        Parameter(help="The same, as an option. May be given many times.", negative="", show_default=False),
    ] = (),
    output: Annotated[Path, Parameter(help="Folder to make; holds train/ and val/ then.")],
    source: Annotated[
        Literal["hf", "parquet", "jsonl", "text"] | None,
        Parameter(help="Left out: by suffix (.parquet; .jsonl, .txt, .md, .rst, also with .gz or .zst)."),
    ] = None,
    tokenizer: Annotated[
        str, Parameter(help="byte, gpt2, o200k_harmony, or a local .tiktoken file; the same as data.tokenizer.")
    ] = "byte",
    max_tokens: Annotated[
        str | None, Parameter(help="Stop after so many tokens, such as 100M or 2B, at a document's end.")
    ] = None,
    val_fraction: Annotated[
        float, Parameter(help="Part of the documents, evenly spread, that is kept for validation; 0: none.")
    ] = 0.1,
    shard_tokens: Annotated[str | None, Parameter(help="Tokens a shard holds at most; left out: 134,217,728.")] = None,
    workers: Annotated[
        int | None, Parameter(help="Processes that tokenize; changes nothing in the output. Left out: one a CPU.")
    ] = None,
    dedupe: Annotated[
        bool, Parameter(help="Leave out documents whose exact text came before.", negative="", show_default=False)
    ] = False,
    text_key: Annotated[str, Parameter(help="Key of JSONL or column that holds the text.")] = "text",
    config: Annotated[str | None, Parameter(help="Of a Hugging Face dataset.")] = None,
    split: Annotated[str, Parameter(help="Of a Hugging Face dataset.")] = "train",
    revision: Annotated[str | None, Parameter(help="Of a Hugging Face dataset: branch, tag or commit.")] = None,
    context: Injected,
) -> None:
    """Tokenize text into shards that training reads.

    Interrupted or killed, it goes on where it stopped when the same command is run again.
    """
    from nmoe.cli.progress import notice_printer, prep_progress
    from nmoe.cli.shard_report import set_rows
    from nmoe.data.errors import SourceError
    from nmoe.data.prep import SHARD_TOKENS, prepare
    from nmoe.data.prep_state import partial_path
    from nmoe.data.remote import Patience
    from nmoe.data.sources import open_source
    from nmoe.data.tokenizers import load_tokenizer
    from nmoe.data.workers import default_workers

    notice = notice_printer(context.console, context.error_console)
    limit = None if max_tokens is None else _count("--max-tokens", max_tokens)
    shard = SHARD_TOKENS if shard_tokens is None else _count("--shard-tokens", shard_tokens)
    loaded = load_tokenizer(tokenizer)
    opened = open_source(
        source,
        [*inputs, *input],
        text_key=text_key,
        config=config,
        split=split,
        revision=revision,
        patience=Patience(notice),
    )
    number = default_workers(opened.total) if workers is None else workers
    print_line(context.console, f"Reading {opened}, {number} worker{'s' if number > 1 else ''}")
    try:
        with prep_progress(context.console, limit) as progress:
            prepared = prepare(
                opened,
                loaded,
                output,
                val_fraction=val_fraction,
                shard_tokens=shard,
                max_tokens=limit,
                workers=number,
                dedupe=dedupe,
                progress=progress,
                notice=notice,
            )
    except (KeyboardInterrupt, SourceError) as error:
        if partial_path(output).exists():
            notice(f"The work so far is in {partial_path(output)}: {_how_on(error)}.")
        raise
    rows = [row for shards in (prepared.train, prepared.val) if shards for row in set_rows(shards)]
    if dedupe:
        rows.append(("duplicates", f"{prepared.duplicates:,} documents left out"))
    if tokenizer == "byte":
        command = f"{context.command} train configs/nano.toml --set data.path={output}"
    else:
        command = f"{context.command} train CONFIG --set data.path={output} --set data.tokenizer={tokenizer}"
    print_summary(context.console, f"Prepared {output}", rows, [command])


def _how_on(error: BaseException) -> str:
    """What becomes of the work that an interruption, or a source, ended."""
    from nmoe.data.errors import NetworkError

    if isinstance(error, (KeyboardInterrupt, NetworkError)):
        return "run the same command again to go on"
    return "it is of the source as it was, so delete that folder if you mend a file"


def _count(option: str, text: str) -> int:
    from nmoe.cli.units import parse_count

    try:
        return parse_count(text)
    except (ValueError, ArithmeticError) as error:
        raise UsageError(f"{option}: expected a number such as 5000, 100k, 1.5M or 2B, found {text!r}") from error
