"""`n data verify`: prepared data against its manifest."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_table
from nmoe.cli.context import Injected
from nmoe.cli.errors import ExitCode


def verify(
    paths: Annotated[
        list[Path], Parameter(help="Folders that `n data prep` wrote, or shard sets in them.", negative="")
    ],
    /,
    *,
    checksums: Annotated[
        bool,
        Parameter(
            help="Read every byte and compare SHA-256 sums, and that documents are whole.",
            negative="",
            show_default=False,
        ),
    ] = False,
    context: Injected,
) -> ExitCode:
    """Compare prepared data with its manifest: every file's presence, size and type.

    Names what is damaged and ends with 3, or ends with 0.
    """
    from nmoe.cli.shard_report import VERIFY_HEADER, verify_row
    from nmoe.cli.shard_sets import set_folders
    from nmoe.data.errors import ShardSetError
    from nmoe.data.shards import ShardSet

    rows: list[tuple[str, ...]] = []
    errors: list[str] = []
    for folder in [folder for path in paths for folder in set_folders(path)]:
        try:
            shards = ShardSet.open(folder, verify="checksums" if checksums else "size")
        except ShardSetError as error:
            errors.append(str(error))
            rows.append((str(folder), "", "", "", "", "DAMAGED"))
        else:
            rows.append(verify_row(shards, "every byte" if checksums else "sizes"))
    print_table(context.console, VERIFY_HEADER, rows)
    for text in errors:
        print_line(context.error_console, f"error: {text}")
    if not checksums and not errors:
        print_line(context.console, "Contents were not read: --checksums compares every byte.")
    return ExitCode.DATA if errors else ExitCode.OK
