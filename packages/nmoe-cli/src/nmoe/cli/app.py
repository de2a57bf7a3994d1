"""The `n` command: finds the command, passes it its process, turns what happens into an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from cyclopts import App, CycloptsError
from nmoe.cli.commands.data_info import info
from nmoe.cli.commands.data_plan import plan
from nmoe.cli.commands.data_prep import prep
from nmoe.cli.commands.data_prep_mixture import prep_mixture
from nmoe.cli.commands.data_show import show
from nmoe.cli.commands.data_verify import verify
from nmoe.cli.commands.doctor import doctor
from nmoe.cli.commands.evaluate import evaluate
from nmoe.cli.commands.export import export
from nmoe.cli.commands.generate import generate
from nmoe.cli.commands.import_model import import_model
from nmoe.cli.commands.runs import runs
from nmoe.cli.commands.train import train
from nmoe.cli.console import make_console, print_line
from nmoe.cli.context import Context
from nmoe.cli.errors import ExitCode
from nmoe.cli.exit_codes import exit_code_of
from nmoe.cli.place import is_rank
from rich.text import Text

_HELP = "Train, evaluate, generate from, import and export Mixture-of-Experts language models."
_EXIT_CODES = """Exit codes:
    0  done
    1  an error that nmoe did not foresee
    2  a mistake in the command line or the configuration
    3  missing, damaged or mismatched data or checkpoint
    4  loss or gradient not finite
    5  the machine lacks something (GPU, memory, disk), or computes other bits
    6  ranks lost one another: of one, another failed first or did not come
  130  stopped by SIGINT
  143  stopped by SIGTERM"""
_PIPE_CLOSED = 141  # 128 + SIGPIPE, as a program that the signal ends


def build_app(context: Context) -> App:
    """The tree of commands. A new command is a file in `commands` and a line here."""
    app = App(
        name="n",
        help=_HELP,
        help_epilogue=_EXIT_CODES,
        help_format="plaintext",  # Markdown would import its parser, a third of the time that --help takes
        version=_version,
        console=context.console,
        error_console=context.error_console,
    )
    data = App(name="data", help="Prepare, verify, describe and read training data.")
    data.command(prep)
    data.command(verify)
    data.command(info)
    data.command(show)
    data.command(plan)
    data.command(prep_mixture)
    app.command(data)
    app.command(runs)
    app.command(train)
    app.command(evaluate, name="eval")
    app.command(generate)
    app.command(export)
    app.command(import_model, name="import")
    app.command(doctor)
    return app


def run(arguments: Sequence[str], context: Context) -> int:
    """Runs `n` with `arguments` and returns its exit code; errors are printed, not raised.

    Raises:
        BrokenPipeError: whoever read the output has gone.
    """
    app = build_app(context)
    try:
        command, bound, injected = app.parse_args(arguments, print_error=False, exit_on_error=False)
        for name in injected:
            bound.arguments[name] = context
        result = command(*bound.args, **bound.kwargs)
        return int(result) if isinstance(result, int) else ExitCode.OK
    except CycloptsError as error:
        _print_error(context, f"{error}\nSee: {' '.join(['n', *(error.command_chain or ())])} --help")
        return ExitCode.USAGE
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _print_error(context, "interrupted")
        return ExitCode.INTERRUPTED
    except Exception as error:
        code = exit_code_of(error)
        if code is ExitCode.BUG:
            raise
        _print_error(context, str(error) or type(error).__name__)
        return code


def main() -> None:
    """Entry point of `n`: the only place that reads the process's arguments, environment and streams."""
    rank = is_rank(os.environ)
    if rank:
        # Rank processes wait for one another in calls that Python's own handler would not interrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a mark, and nothing fails
    context = Context(
        data_root=Path(os.environ.get("NMOE_DATA_PATH") or "data"),
        environ=os.environ,
        console=make_console(sys.stdout),
        error_console=make_console(sys.stderr),
        command="uv run n" if "UV" in os.environ else "n",  # uv sets it for what it runs
    )
    try:
        code = run(sys.argv[1:], context)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again at exit: let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _PIPE_CLOSED
    except Exception:
        if not rank:
            raise
        traceback.print_exc()
        code = ExitCode.BUG
    if rank and code != ExitCode.OK:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Ends a rank without the interpreter's tidying up, in which a process group may wait for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _print_error(context: Context, text: str) -> None:
    first, *rest = text.splitlines()
    context.error_console.print(Text.assemble(("error: ", "bold red"), first), soft_wrap=True)
    for line in rest:
        print_line(context.error_console, line)


def _version() -> str:
    from importlib import metadata

    try:
        return f"nmoe {metadata.version('nmoe-cli')}"
    except metadata.PackageNotFoundError:
        return "nmoe from source"
