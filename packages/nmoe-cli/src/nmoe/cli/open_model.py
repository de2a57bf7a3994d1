"""Loads a located model for evaluation and generation."""

from dataclasses import dataclass
from typing import Literal

from nmoe.cli.config import RunConfig, load_config
from nmoe.cli.context import Context
from nmoe.cli.errors import EnvironmentNotReadyError
from nmoe.cli.locate import Located, locate_model
from nmoe.kernels.errors import UnsupportedArchError
from nmoe.kernels.ops import Tier, select_ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.transformer import Transformer
from nmoe.model.weights import read_model
from nmoe.rdep.transport import LocalTransport
from nmoe.train.checkpointer import load
from nmoe.train.loop import DTYPES

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class OpenModel:
    """A model ready to use, and where it came from."""

    model: Transformer
    folder: TensorFolder
    located: Located
    config: RunConfig | None
    """Of the run; None for an imported model."""
    as_trained: bool
    """Whether device, precision and kernels are those that the run was trained with."""


def open_model(name: str, context: Context, device: Device | None, kernels: Tier | None = None) -> OpenModel:
    """Loads the model that `name` stands for (see `locate_model`).

    Args:
        name: run, RUN@STEP or folder.
        context: the process.
        device: where to run; None: where the run was trained, or the CPU for an imported model. On the CPU a model runs
            in fp32 with reference kernels; on a GPU as its run was configured, or in bf16 with native kernels.
        kernels: takes the place of the kernels that follow from `device`. Native ones compute in bf16.

    Raises:
        EnvironmentNotReadyError: the run was trained on a GPU and none is here, or the device has no such kernels.
    """
    import torch

    located = locate_model(name, context.data_root)
    config = None
    if located.run is not None:
        config = load_config(located.run.config, environ=context.environ).config
    chosen = device or (config.runtime.device if config else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise EnvironmentNotReadyError(
            "expected a CUDA GPU, found none: add --device cpu to compute in fp32 on the CPU"
        )
    runtime = config.runtime if config and config.runtime.device == chosen else None
    tier = kernels or (runtime.kernels if runtime else ("native" if chosen == "cuda" else "reference"))
    precision = runtime.precision if runtime else ("bf16" if chosen == "cuda" else "fp32")
    if tier == "native":
        precision = "bf16"
    as_trained = runtime is not None and runtime.kernels == tier
    try:
        ops = select_ops(tier, chosen)
    except UnsupportedArchError as error:
        raise EnvironmentNotReadyError(f"{error}; for this command, add --kernels reference") from error
    folder = load(located.folder)
    model = read_model(folder, ops, LocalTransport(), device=chosen, dtype=DTYPES[precision])
    return OpenModel(model, folder, located, config, as_trained)
