"""`n data show`: prepared data as text again."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_summary, print_table
from nmoe.cli.context import Injected
from nmoe.cli.errors import UsageError
from rich.text import Text


def show(
    path: Annotated[Path, Parameter(help="Folder that `n data prep` wrote (its train/ is shown), or a shard set.")],
    /,
    *,
    doc: Annotated[int | None, Parameter(help="Number of a document, from 0.")] = None,
    sample: Annotated[int | None, Parameter(help="Number of a training sample in stored order, from 0.")] = None,
    seq_len: Annotated[int, Parameter(help="Tokens a sample has.")] = 1024,
    tokenizer: Annotated[
        str | None, Parameter(help="For tokens of a local .tiktoken file; left out: as the manifest says.")
    ] = None,
    context: Injected,
) -> None:
    """Show a document or a training sample of prepared data as text."""
    from nmoe.cli.shard_report import document_rows, sample_rows
    from nmoe.cli.shard_sets import set_folders
    from nmoe.data.errors import UnknownTokenizerError
    from nmoe.data.guards import check_tokenizer
    from nmoe.data.shards import ShardSet
    from nmoe.data.tokenizers import load_tokenizer

    if (doc is None) == (sample is None):
        raise UsageError("expected --doc N or --sample N, found " + ("neither" if doc is None else "both"))
    shards = ShardSet.open(set_folders(path)[0])
    try:
        loaded = load_tokenizer(tokenizer or shards.manifest.tokenizer.name)
    except UnknownTokenizerError as error:
        if tokenizer is not None:
            raise
        made_by = shards.manifest.tokenizer.name
        raise UsageError(
            f"{shards.path}: tokenizer {made_by!r} was a local file: name the .tiktoken file with --tokenizer"
        ) from error
    check_tokenizer(shards, loaded)
    if doc is not None:
        tokens = shards.document(doc)
        print_summary(context.console, f"{shards.path}, document {doc}", document_rows(shards, tokens))
    else:
        assert sample is not None, "one of the two is given"
        if seq_len < 1:
            raise UsageError(f"--seq-len: expected 1 or more, found {seq_len}")
        tokens = shards.tokens(sample * seq_len, seq_len + 1)
        print_table(context.console, *sample_rows(shards, sample * seq_len, tokens))
    context.console.print()
    # The end of a document is part of what a model reads.
    context.console.print(Text(_printable(loaded.decode(tokens, specials=True))), soft_wrap=True)


def _printable(text: str) -> str:
    """The text without what a terminal would act on."""
    text = text.replace("\r\n", "\n")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
