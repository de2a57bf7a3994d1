"""`n data info`: what prepared data holds."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_summary
from nmoe.cli.context import Injected


def info(
    path: Annotated[Path, Parameter(help="Folder that `n data prep` wrote, or a shard set in it.")],
    /,
    *,
    context: Injected,
) -> None:
    """Show tokenizer, sizes, source and fingerprint of prepared data."""
    from nmoe.cli.shard_report import detail_rows
    from nmoe.cli.shard_sets import set_folders
    from nmoe.data.shards import ShardSet

    for folder in set_folders(path):
        print_summary(context.console, str(folder), detail_rows(ShardSet.open(folder)))
