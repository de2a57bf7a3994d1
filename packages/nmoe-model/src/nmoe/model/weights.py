"""A model in a tensor folder: its configuration as the document `model`, its tensors under `model/`.

Training checkpoints and imported models share this part, so that reading weights needs nothing of the trainer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from nmoe.kernels.ops import Ops, select_ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.errors import WeightsMismatchError
from nmoe.model.schema import ModelConfig
from nmoe.model.tensor_pieces import TensorPiece
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
    fill_pieces(folder, PREFIX, model.pieces())
    return model.eval()


def shape_problems(folder: TensorFolder, config: ModelConfig) -> list[str]:
    """Why the folder's weights are not those of a model of this configuration; empty where they are."""
    with torch.device("meta"):
        targets = Transformer(config, select_ops("reference", "cpu"), LocalTransport()).state()
    return _problems(folder, PREFIX, {name: tuple(target.shape) for name, target in targets.items()})


@torch.no_grad()
def fill_pieces(folder: TensorFolder, prefix: str, pieces: Iterable[TensorPiece]) -> None:
    """Fills the tensors of `pieces` with their elements of the folder's tensors `prefix + name`, converting dtypes.

    The folder may have been written by any number of ranks.

    Args:
        folder: to read from.
        prefix: of the tensors' names in the folder.
        pieces: at least one of each tensor that the folder should have under the prefix; one without elements says
            that there is such a tensor, and that this rank holds nothing of it.

    Raises:
        WeightsMismatchError: a tensor is missing, has another shape, or is one too many. Nothing has been filled then.
    """
    pieces = list(pieces)
    problems = _problems(folder, prefix, {piece.name: tuple(piece.shape) for piece in pieces})
    if problems:
        raise WeightsMismatchError(folder.path, problems)
    for piece in pieces:
        if piece.tensor.numel() > 0:
            found = folder.read_range(prefix + piece.name, piece.start, piece.stop)
            piece.tensor.copy_(found.view(piece.tensor.shape))


def _problems(folder: TensorFolder, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    saved = {name.removeprefix(prefix): shape for name, shape in folder.shapes.items() if name.startswith(prefix)}
    problems = []
    for name, shape in shapes.items():
        if name not in saved:
            problems.append(f"no tensor {name}")
        elif saved[name] != shape:
            problems.append(f"{name} of shape {saved[name]}, expected {shape}")
    return problems + [f"a tensor {name} that this model lacks" for name in sorted(saved.keys() - shapes.keys())]
