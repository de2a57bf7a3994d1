"""A model in a tensor folder: its configuration as the document `model`, its tensors under `model/`.

Training checkpoints and imported models share this part, so that reading weights needs nothing of the trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from nmoe.kernels.ops import Ops, select_ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.errors import WeightsMismatchError
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport, Transport

PREFIX = "model/"
"""Of the model's tensors among a folder's."""
DOCUMENT = "model"
"""Name of the document that holds the configuration."""


def config_document(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON; unset fields are absent."""
    return config.model_dump(mode="json", exclude_none=True)


def read_config(folder: TensorFolder) -> ModelConfig:
    """The configuration of the model in `folder`."""
    return ModelConfig.model_validate(folder.document(DOCUMENT))


def read_model(
    folder: TensorFolder, ops: Ops, transport: Transport, *, device: torch.device | str, dtype: torch.dtype
) -> Transformer:
    """The model in `folder`, in evaluation mode.

    Args:
        folder: a checkpoint or an imported model.
        ops: the kernel tier.
        transport: how rows reach experts.
        device: where the parameters go.
        dtype: of all parameters but the routers'; weights of another dtype are rounded to it.

    Raises:
        WeightsMismatchError: the tensors are not those of the configuration.
    """
    model = Transformer.build(read_config(folder), ops, transport, device=device, dtype=dtype)
    copy_weights(folder, PREFIX, model.state())
    return model.eval()


def shape_problems(folder: TensorFolder, config: ModelConfig) -> list[str]:
    """Why the folder's weights are not those of a model of this configuration; empty where they are."""
    with torch.device("meta"):
        targets = Transformer(config, select_ops("reference", "cpu"), LocalTransport()).state()
    return _problems(folder, PREFIX, targets)


@torch.no_grad()
def copy_weights(folder: TensorFolder, prefix: str, targets: Mapping[str, torch.Tensor]) -> None:
    """Fills `targets` with the folder's tensors `prefix + name`, converting dtypes.

    Raises:
        WeightsMismatchError: one is missing, has another shape, or is one too many. No target has been filled then.
    """
    problems = _problems(folder, prefix, targets)
    if problems:
        raise WeightsMismatchError(folder.path, problems)
    for name, target in targets.items():
        target.copy_(folder.tensor(prefix + name))


def _problems(folder: TensorFolder, prefix: str, targets: Mapping[str, torch.Tensor]) -> list[str]:
    saved = {name.removeprefix(prefix): shape for name, shape in folder.shapes.items() if name.startswith(prefix)}
    problems = []
    for name, target in targets.items():
        if name not in saved:
            problems.append(f"no tensor {name}")
        elif saved[name] != tuple(target.shape):
            problems.append(f"{name} of shape {saved[name]}, expected {tuple(target.shape)}")
    return problems + [f"a tensor {name} that this model lacks" for name in sorted(saved.keys() - targets.keys())]
