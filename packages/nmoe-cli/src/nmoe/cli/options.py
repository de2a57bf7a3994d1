"""Options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

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
ModelName: TypeAlias = Annotated[str, Parameter(help="A run, RUN@STEP, or the folder of an imported model.")]
TokenizerName: TypeAlias = Annotated[str | None, Parameter(help="For a model that names none.")]
DeviceName: TypeAlias = Annotated[Literal["cpu", "cuda"] | None, Parameter(help="The run's own if left out.")]
KernelsName: TypeAlias = Annotated[
    Literal["native", "reference"] | None,
    Parameter(
        help="As runtime.kernels of a configuration: reference runs on every device. Left out: the run's own, or "
        "native on a GPU and reference on the CPU."
    ),
]
