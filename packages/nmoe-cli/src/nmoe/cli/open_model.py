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


@dataclass(frozen=True)
class Computing:
    """How a model is computed."""

    tier: Tier
    precision: str
    as_trained: bool
    """Whether device, precision and kernels are those that the run was trained with."""


def computing(config: RunConfig | None, device: Device, kernels: Tier | None) -> Computing:
    """On the CPU in fp32 with reference kernels; on a GPU as the run was configured, or in bf16 with native kernels.

    Args:
        config: of the run; None for an imported model.
        device: where.
        kernels: takes the place of the kernels that follow. Native ones compute in bf16.
    """
    runtime = config.runtime if config and config.runtime.device == device else None
    on_gpu = device == "cuda"
    tier = kernels or (runtime.kernels if runtime else ("native" if on_gpu else "reference"))
    precision = runtime.precision if runtime else ("bf16" if on_gpu else "fp32")
    as_trained = runtime is not None and runtime.kernels == tier
    return Computing(tier, "bf16" if tier == "native" else precision, as_trained)


def open_model(name: str, context: Context, device: Device | None, kernels: Tier | None = None) -> OpenModel:
    """Loads the model that `name` stands for (see `locate_model`).

    Args:
        name: run, RUN@STEP or folder.
        context: the process.
        device: where to run; None: where the run was trained, or the CPU for an imported model.
        kernels: as `computing` has them.

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
    how = computing(config, chosen, kernels)
    try:
        ops = select_ops(how.tier, chosen)
    except UnsupportedArchError as error:
        raise EnvironmentNotReadyError(f"{error}; for this command, add --kernels reference") from error
    folder = load(located.folder)
    model = read_model(folder, ops, LocalTransport(), device=chosen, dtype=DTYPES[how.precision])
    return OpenModel(model, folder, located, config, how.as_trained)
