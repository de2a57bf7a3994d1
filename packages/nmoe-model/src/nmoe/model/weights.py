"""A model in a tensor folder: its configuration as the document `model`, its tensors under `model/`.

Training checkpoints and imported models share this part, so that reading weights needs nothing of the trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.errors import WeightsMismatchError
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import Transport

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


@torch.no_grad()
def copy_weights(folder: TensorFolder, prefix: str, targets: Mapping[str, torch.Tensor]) -> None:
    """Fills `targets` with the folder's tensors `prefix + name`, converting dtypes.

    Raises:
        WeightsMismatchError: one is missing or has another shape. Targets before it may have been filled.
    """
    names, problems = set(folder.names), []
    for name, target in targets.items():
        if prefix + name not in names:
            problems.append(f"no tensor {name}")
            continue
        saved = folder.tensor(prefix + name)
        if saved.shape != target.shape:
            problems.append(f"{name} of shape {tuple(saved.shape)}, expected {tuple(target.shape)}")
            continue
        target.copy_(saved)
    if problems:
        raise WeightsMismatchError(folder.path, problems)
