"""`n data prep`: text to token shards."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_summary
from nmoe.cli.context import Injected


def prep(
    inputs: Annotated[
        list[Path], Parameter(help="Text, JSONL (also .gz) or Parquet files, or folders of such.", negative="")
    ],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder to make; holds train/ and val/ then.")],
    tokenizer: Annotated[
        str, Parameter(help="byte, gpt2, o200k_harmony, or a local .tiktoken file; the same as data.tokenizer.")
    ] = "byte",
    val_fraction: Annotated[
        float, Parameter(help="Part of the documents, the last ones, that is kept for validation; 0: none.")
    ] = 0.1,
    text_key: Annotated[str, Parameter(help="Key of JSONL or column of Parquet that holds the text.")] = "text",
    context: Injected,
) -> None:
    """Tokenize text into shards that training reads."""
    from nmoe.cli.progress import document_progress
    from nmoe.cli.shard_report import set_rows
    from nmoe.data.prep import prepare
    from nmoe.data.sources import TextFiles
    from nmoe.data.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    source = TextFiles(inputs, text_key)
    print_line(context.console, f"Reading {len(source.files)} files")
    with document_progress(context.console) as progress:
        prepared = prepare(
            source, loaded, output, val_fraction=val_fraction, source=source.describe(), progress=progress
        )
    rows = [row for shards in (prepared.train, prepared.val) if shards for row in set_rows(shards)]
    if tokenizer == "byte":
        command = f"{context.command} train configs/nano.toml --set data.path={output}"
    else:
        command = f"{context.command} train CONFIG --set data.path={output} --set data.tokenizer={tokenizer}"
    print_summary(context.console, f"Prepared {output}", rows, [command])
