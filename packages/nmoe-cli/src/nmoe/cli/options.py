"""Options that several commands take."""

from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter

ConfigFile: TypeAlias = Annotated[Path, Parameter(help="Configuration: a TOML file, such as configs/nano.toml.")]
Sets: TypeAlias = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        show_default=False,
        help="Override a key: section.key=value. May be given many times.",
    ),
]
