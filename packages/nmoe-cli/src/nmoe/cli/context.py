"""What a command gets of the process that it runs in: read once, in `main`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter
from rich.console import Console


@dataclass(frozen=True)
class Context:
    """The process around a command."""

    data_root: Path
    """Holds `experiments.db`, `runs/` and prepared corpora: `${NMOE_DATA_PATH:-data}`."""
    environ: Mapping[str, str]
    """Variables that a configuration's placeholders may name."""
    console: Console
    """Standard output."""
    error_console: Console
    """Standard error."""
    command: str = "n"
    """How a person types `n` here, for the commands that are suggested."""
    program: tuple[str, ...] = (sys.executable, "-m", "nmoe.cli")
    """How a process of `n` is started: each rank of a run is one."""


Injected: TypeAlias = Annotated[Context, Parameter(parse=False)]
"""A keyword-only parameter of this type is no option: `n` passes the process's `Context`."""
