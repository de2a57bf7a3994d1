"""The training state as one object that saves and restores itself: weights, optimizer, progress, random generators."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nmoe.kernels.reference.master import load_master, store_master
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.transformer import Transformer
from nmoe.model.weights import DOCUMENT, PREFIX, config_document, copy_weights
from nmoe.train.errors import IdentityMismatchError
from nmoe.train.optim import Optimizer

OPTIMIZER, RNG = "optimizer/", "rng/"


@dataclass
class TrainState:
    """All that decides what a run computes next."""

    model: Transformer
    optimizer: Optimizer
    identity: Mapping[str, Any]
    """Configuration fields that decide what is computed, and the data's fingerprint."""
    labels: Mapping[str, Any]
    """Documents to save beside the state, such as the tokenizer's name."""
    step: int = 0
    """Updates applied."""
    cursor: int = 0
    """Global samples consumed."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor to save, on its device."""
        tensors = {PREFIX + name: tensor for name, tensor in self.model.state().items()}
        tensors |= {OPTIMIZER + name: tensor for name, tensor in self.optimizer.state.items()}
        tensors[RNG + "cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors[RNG + "cuda"] = torch.cuda.get_rng_state(self._device)
        return tensors

    def documents(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {
            DOCUMENT: config_document(self.model.config),
            "progress": {"step": self.step, "cursor": self.cursor},
            "identity": dict(self.identity),
            **self.labels,
        }

    def restore(self, folder: TensorFolder) -> None:
        """Continues from a checkpoint of the same run.

        Raises:
            IdentityMismatchError: the checkpoint was made under other settings or data; lists each, old and new.
        """
        check_identity(folder.document("identity"), self.identity)
        copy_weights(folder, PREFIX, self.model.state())
        copy_weights(folder, OPTIMIZER, self.optimizer.state)
        torch.set_rng_state(folder.tensor(RNG + "cpu"))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(folder.tensor(RNG + "cuda"), self._device)
        progress = folder.document("progress")
        self.step, self.cursor = progress["step"], progress["cursor"]

    def start_from(self, folder: TensorFolder) -> None:
        """Takes another run's weights (and nothing else) as the start. Masters stay exact whatever the precisions: from
        bf16 with residuals to fp32 and back.

        Raises:
            WeightsMismatchError: the weights are not of this model's shape.
        """
        copy_weights(folder, PREFIX, self.model.state())
        saved_names = set(folder.names)
        for name, parameter in self.optimizer.parameters.items():
            residual = self.optimizer.state.get(f"{name}/residual")
            saved_name = f"{OPTIMIZER}{name}/residual"
            saved_residual = folder.tensor(saved_name) if saved_name in saved_names else None
            if residual is None and saved_residual is None:
                continue  # the weight is its own master, and has been copied
            master = load_master(folder.tensor(PREFIX + name), saved_residual).float()
            store_master(master, parameter.data, residual)

    @property
    def _device(self) -> torch.device:
        return self.model.head.weight.device


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a run under settings that change what it computes.

    Raises:
        IdentityMismatchError: with every key that differs, old and new.
    """
    keys = sorted(saved.keys() | current.keys())
    changed = [(key, saved.get(key), current.get(key)) for key in keys if saved.get(key) != current.get(key)]
    if changed:
        raise IdentityMismatchError(changed)
