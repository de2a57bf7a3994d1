"""`n data verify`: every byte of prepared data against its checksums."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_line
from nmoe.cli.context import Injected
from nmoe.cli.errors import ExitCode


def verify(
    paths: Annotated[
        list[Path], Parameter(help="Folders that `n data prep` wrote, or shard sets in them.", negative="")
    ],
    /,
    *,
    context: Injected,
) -> ExitCode:
    """Read prepared data whole and compare it with its checksums.

    Names what is damaged and ends with 3, or ends with 0.
    """
    from nmoe.cli.shard_sets import set_folders
    from nmoe.data.errors import ShardSetError
    from nmoe.data.shards import ShardSet

    code = ExitCode.OK
    for folder in [folder for path in paths for folder in set_folders(path)]:
        try:
            shards = ShardSet.open(folder, verify="checksums")
        except ShardSetError as error:
            code = ExitCode.DATA
            print_line(context.error_console, f"error: {error}")
        else:
            print_line(context.console, f"ok  {folder}: {shards.n_documents} documents, {shards.n_tokens} tokens")
    return code
