"""`n train`: trains a model, or continues a run."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from nmoe.cli.context import Injected
from nmoe.cli.errors import UsageError
from nmoe.cli.options import ConfigFile, Sets


def train(
    config: ConfigFile,
    /,
    *,
    sets: Sets = (),
    gpus: Annotated[
        int | None, Parameter(help="Train on so many GPUs of this machine: --set runtime.world_size=N.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Print the resolved configuration, sizes and memory, and stop.")
    ] = False,
    run_id: Annotated[
        str | None, Parameter(help="Name of the run; one that exists is continued from its newest checkpoint.")
    ] = None,
    resume: Annotated[
        bool | None,
        Parameter(help="With --run-id: the run must exist (--resume), or must not (--no-resume).", show_default=False),
    ] = None,
    from_: Annotated[
        str | None,
        Parameter(name="--from", help="Start a new run with the weights of RUN, RUN@STEP or an imported model."),
    ] = None,
    profile: Annotated[
        str | None, Parameter(help="START:STOP, the first and the last step of a profiler trace in the run's folder.")
    ] = None,
    context: Injected,
) -> int:
    """Train a model: a new run each time, unless --run-id names an unfinished one."""
    from nmoe.cli.config import load_config

    if gpus is not None:
        sets = (*sets, f"runtime.world_size={gpus}")
    loaded = load_config(Path(config), sets, environ=context.environ)
    if gpus is not None and loaded.config.runtime.device == "cpu":
        raise UsageError(
            f"--gpus {gpus}: expected runtime.device = 'cuda', found 'cpu': for ranks on CPUs use "
            f"--set runtime.world_size={gpus}"
        )
    if dry_run:
        from nmoe.cli.dry_run import print_dry_run

        print_dry_run(context.console, loaded)
        return 0
    from nmoe.cli.run_inputs import Request
    from nmoe.cli.training import run_training

    return run_training(Request(Path(config), loaded, run_id, resume, from_, profile), context)
