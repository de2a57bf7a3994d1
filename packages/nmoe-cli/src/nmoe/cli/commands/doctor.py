"""`n doctor`: what this machine can run."""

from typing import Annotated, Literal

from cyclopts import Parameter
from nmoe.cli.console import print_line, print_table
from nmoe.cli.context import Injected
from nmoe.cli.errors import ExitCode


def doctor(
    *,
    device: Annotated[
        Literal["cpu", "cuda"] | None, Parameter(help="What the machine is meant for; default: what it has.")
    ] = None,
    context: Injected,
) -> ExitCode:
    """Check GPU, driver, peer access, compilers, disk and packages.

    Ends with 0 if all that the device needs works, else with 5.
    """
    from nmoe.cli.doctor import Status, diagnose

    checks = list(diagnose(device, context.data_root))
    rows = [(check.status.value, check.name, check.found) for check in checks]
    print_table(context.console, ("status", "part", "found"), rows)
    notes = [f"{check.name}: {check.means}" for check in checks if check.means]
    for note in ["", *notes] if notes else []:
        print_line(context.console, note)
    return ExitCode.ENVIRONMENT if any(check.status is Status.BROKEN for check in checks) else ExitCode.OK
