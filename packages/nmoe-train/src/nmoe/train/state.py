"""The training state as one object that saves and restores itself: weights, optimizer, progress, random generators."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from nmoe.kernels.reference.master import load_master, split_master
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.tensor_pieces import TensorPiece, whole_pieces
from nmoe.model.transformer import Transformer
from nmoe.model.weights import DOCUMENT, PREFIX, config_document, fill_pieces
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

    def pieces(self) -> list[TensorPiece]:
        """What this rank saves, on its device; all ranks together save every element of every tensor once. Of weights
        it is what the rank updates; what no update is divided for, and is the same on all ranks, is rank 0's."""
        pieces = [replace(piece, name=PREFIX + piece.name) for piece in self._own_weights()]
        pieces += [replace(piece, name=OPTIMIZER + piece.name) for piece in self._optimizer_pieces()]
        if self.optimizer.flat.world.rank == 0:
            generators = {"cpu": torch.get_rng_state()}
            if self._device.type == "cuda":
                generators["cuda"] = torch.cuda.get_rng_state(self._device)
            pieces += whole_pieces(generators, RNG)
        return pieces

    def documents(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {
            DOCUMENT: config_document(self.model.config),
            "progress": {"step": self.step, "cursor": self.cursor},
            "identity": dict(self.identity),
            **self.labels,
        }

    def restore(self, folder: TensorFolder) -> None:
        """Continues from a checkpoint of the same run, made by any number of ranks.

        Raises:
            IdentityMismatchError: the checkpoint was made under other settings or data; lists each, old and new.
        """
        check_identity(folder.document("identity"), self.identity)
        fill_pieces(folder, PREFIX, self.model.pieces())
        fill_pieces(folder, OPTIMIZER, self._optimizer_pieces())
        torch.set_rng_state(folder.tensor(RNG + "cpu"))
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(folder.tensor(RNG + "cuda"), self._device)
        progress = folder.document("progress")
        self.step, self.cursor = progress["step"], progress["cursor"]

    @torch.no_grad()
    def start_from(self, folder: TensorFolder) -> None:
        """Takes another run's weights (and nothing else) as the start. Masters stay exact whatever the precisions: from
        bf16 with residuals to fp32 and back.

        Raises:
            WeightsMismatchError: the weights are not of this model's shape.
        """
        fill_pieces(folder, PREFIX, self.model.pieces())
        saved_names = set(folder.names)
        for whole in self.model.pieces():
            residuals = [
                piece for piece in self.optimizer.state.get(whole.name, ()) if piece.name.endswith("/residual")
            ]
            saved_name = f"{OPTIMIZER}{whole.name}/residual"
            if not residuals and saved_name not in saved_names:
                continue  # the weight is its own master, and has been copied
            here = whole.start, whole.stop
            saved_residual = folder.read_range(saved_name, *here) if saved_name in saved_names else None
            master = load_master(folder.read_range(PREFIX + whole.name, *here), saved_residual).float()
            weight, rest = split_master(master) if residuals else (master, master)
            whole.tensor.copy_(weight.view(whole.tensor.shape))
            for piece in residuals:
                piece.tensor.copy_(rest[piece.start : piece.stop].view(piece.tensor.shape))

    def _own_weights(self) -> Iterator[TensorPiece]:
        """Of the model's tensors what this rank saves."""
        flat = self.optimizer.flat
        for piece in self.model.pieces():
            if piece.name not in flat.parameters:
                if flat.world.rank == 0:
                    yield piece
                continue
            elements = piece.tensor.detach().view(-1)
            for span in flat.parts(piece.name):
                whole = span.size == len(elements)
                part = piece.tensor if whole else elements[span.start : span.start + span.size]
                yield replace(piece, start=piece.start + span.start, tensor=part)

    def _optimizer_pieces(self) -> list[TensorPiece]:
        """The optimizer's state, in which experts stand by their global ids."""
        whole = {piece.name: piece for piece in self.model.pieces()}
        return [
            replace(piece, shape=whole[name].shape, start=whole[name].start + piece.start)
            for name, pieces in self.optimizer.state.items()
            for piece in pieces
        ]

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
