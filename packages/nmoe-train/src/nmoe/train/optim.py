"""The optimizers: AdamW and Muon over flat buffers of parameters, with fp32 masters, driven from device memory.

Weights in bf16 carry a 16-bit residual that makes them exact fp32 masters (`nmoe.kernels.reference.master`). Muon
follows Moonlight (arXiv:2502.16982): Nesterov momentum, Newton-Schulz, updates scaled to AdamW's typical size by
`0.2 · sqrt(max(rows, columns))`, decoupled decay.

An update can be captured in a CUDA graph: what changes from step to step is read from device memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

import torch
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.adamw import adamw_scalars
from nmoe.model.transformer import Role, parameter_role
from nmoe.train.flat import FlatGroup, FlatParameters
from nmoe.train.gradients import Gradients
from nmoe.train.schema import OptimConfig
from torch import nn

Kind = Literal["adamw", "muon"]

MUON_BATCH_ELEMENTS = 1 << 26
"""Bound on the elements of Muon's matrices that are orthogonalised together, unless one matrix (of an odd size: eight)
has more.

They take temporaries, on a GPU in bf16: three tensors of their size and two of the short side squared; at most (square
matrices) five times 128 MiB.
"""

MUON_RMS = 0.2
"""Root mean square of an AdamW update, seen in practice, that Muon's is scaled to (Moonlight, section 2.2)."""


@dataclass(frozen=True)
class GroupSettings:
    """How the parameters of one role are updated."""

    kind: Kind
    lr: float
    beta2: float
    weight_decay: float


def group_settings(config: OptimConfig, role: Role) -> GroupSettings:
    """The settings of a role: router and norms are never decayed; embedding, head, norms and router stay on AdamW."""
    outer_lr = config.lr_dense if config.lr_embed is None else config.lr_embed
    match role:
        case "embed":
            return GroupSettings("adamw", outer_lr, config.beta2_dense, config.weight_decay)
        case "norm":
            return GroupSettings("adamw", outer_lr, config.beta2_dense, 0.0)
        case "router":
            return GroupSettings("adamw", config.lr_router, config.beta2_router, 0.0)
        case "expert":
            return GroupSettings(config.expert_optimizer, config.lr_expert, config.beta2_expert, config.weight_decay)
        case "dense":
            return GroupSettings(config.dense_optimizer, config.lr_dense, config.beta2_dense, config.weight_decay)


def flatten(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> FlatParameters[GroupSettings]:
    """Puts the parameters of each settings and dtype into one buffer."""
    return FlatParameters(parameters, lambda name: group_settings(config, parameter_role(name)))


class MuonBatch(NamedTuple):
    """Equal matrices that lie one after another in a group's buffers, orthogonalised together."""

    start: int
    """Of the first, in elements."""
    shape: tuple[int, int, int]
    """Matrices, rows, columns."""

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The matrices in a buffer of the group."""
        count, rows, columns = self.shape
        return buffer[self.start : self.start + count * rows * columns].view(self.shape)


def muon_batches(group: FlatGroup[GroupSettings]) -> list[MuonBatch]:
    """All matrices of a group, in batches of at most `MUON_BATCH_ELEMENTS` and of even sizes, each from a multiple of
    eight elements on."""
    runs: list[MuonBatch] = []
    for name, shape in group.shapes.items():
        start, (rows, columns) = group.starts[name], shape[-2:]
        size, matrices = rows * columns, shape.numel() // (rows * columns)
        last = runs[-1] if runs else None
        if last is not None and last.shape[1:] == (rows, columns) and last.start + last.shape[0] * size == start:
            runs[-1] = MuonBatch(last.start, (last.shape[0] + matrices, rows, columns))
        else:
            runs.append(MuonBatch(start, (matrices, rows, columns)))
    return [batch for run in runs for batch in _divide(run)]


def _divide(run: MuonBatch) -> Iterator[MuonBatch]:
    matrices, rows, columns = run.shape
    batches = -(-matrices // max(1, MUON_BATCH_ELEMENTS // (rows * columns)))
    # Matrices that fill pieces of 16 bytes, at which kernels want a tensor to start.
    whole = 8 // gcd(8, rows * columns)
    each = -(-matrices // batches // whole) * whole
    for first in range(0, matrices, each):
        yield MuonBatch(run.start + first * rows * columns, (min(each, matrices - first), rows, columns))


class Optimizer:
    """Updates parameters from their accumulated fp32 gradients.

    Attributes:
        parameters: by name.
        state: named tensors in the parameters' shapes, fit for a checkpoint: `<parameter>/residual` beside bf16
            weights, `<parameter>/exp_avg` and `/exp_avg_sq` under AdamW, `<parameter>/momentum` under Muon.
    """

    def __init__(self, flat: FlatParameters[GroupSettings], config: OptimConfig, ops: Ops) -> None:
        self.config, self.ops, self.parameters = config, ops, flat.parameters
        self._groups = [_Group(group) for group in flat.groups]
        n_rows = sum(group.n_rows for group in self._groups)
        self._scalars = torch.full((n_rows, 3), torch.nan, device=flat.groups[0].weight.device)
        held = {name: views for group in self._groups for name, views in group.state().items()}
        self.state = {f"{name}/{kind}": view for name in self.parameters for kind, view in held[name].items()}

    def set_step(self, *, step: int, lr_factor: float) -> None:
        """Tells the device which update comes next. The host does not wait, and earlier updates keep their own numbers.

        Args:
            step: the update's number, from 1.
            lr_factor: of every group's learning rate.
        """
        rows = [row for group in self._groups for row in group.scalars(self.config, step, lr_factor)]
        # A pinned tensor of its own for each call: torch keeps its memory until the copy has been made.
        host = torch.tensor(rows, dtype=torch.float32, pin_memory=self._scalars.is_cuda)
        self._scalars.copy_(host, non_blocking=True)

    @torch.no_grad()
    def step(self, gradients: Gradients, *, grad_scale: torch.Tensor, ok: torch.Tensor) -> None:
        """One update of every parameter, with the numbers of the last `set_step`.

        Args:
            gradients: of the parameters; left as they are.
            grad_scale: scalar on the device that multiplies every gradient.
            ok: int32 scalar on the device; 0: weights and state keep their bits, whatever the gradients hold.
        """
        row = 0
        for group, grad in zip(self._groups, gradients.buffers, strict=True):
            rows = self._scalars[row : row + group.n_rows]
            row += group.n_rows
            if group.settings.kind == "muon":
                self._muon(group, grad, grad_scale, ok, rows)
                continue
            self.ops.adamw_(
                group.weight,
                group.residual,
                grad,
                group.moments["exp_avg"],
                group.moments["exp_avg_sq"],
                grad_scale,
                ok,
                rows[0],
                beta1=self.config.beta1,
                beta2=group.settings.beta2,
                eps=self.config.eps,
            )

    def _muon(
        self, group: "_Group", grad: torch.Tensor, grad_scale: torch.Tensor, ok: torch.Tensor, rows: torch.Tensor
    ) -> None:
        ops, config = self.ops, self.config
        for batch, row in zip(group.batches, rows, strict=True):
            momentum = batch.view(group.moments["momentum"])
            ahead = ops.muon_momentum_(batch.view(grad), momentum, grad_scale, ok, beta=config.muon_momentum)
            update = ops.newton_schulz(ahead, steps=config.muon_steps)
            residual = None if group.residual is None else batch.view(group.residual)
            ops.muon_apply_(batch.view(group.weight), residual, update, ok, row[:2])


class _Group:
    """The buffers of a group, and the numbers of its next update: a row for AdamW, one for each of Muon's batches."""

    def __init__(self, flat: FlatGroup[GroupSettings]) -> None:
        self.settings, self.weight, self._flat = flat.key, flat.weight, flat
        self.residual = flat.zeros(torch.int16) if flat.dtype == torch.bfloat16 else None
        kinds = ("exp_avg", "exp_avg_sq") if flat.key.kind == "adamw" else ("momentum",)
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.moments = {kind: flat.zeros(wide) for kind in kinds}
        self.batches = muon_batches(flat) if flat.key.kind == "muon" else []
        self.n_rows = len(self.batches) or 1

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By parameter and kind."""
        buffers = self.moments if self.residual is None else {"residual": self.residual, **self.moments}
        return {name: {kind: self._flat.view(b, name) for kind, b in buffers.items()} for name in self._flat.shapes}

    def scalars(self, config: OptimConfig, step: int, lr_factor: float) -> list[tuple[float, float, float]]:
        """The numbers of an update, in double precision, three a row."""
        lr, decay = self.settings.lr * lr_factor, self.settings.weight_decay
        if self.settings.kind == "adamw":
            beta1, beta2 = config.beta1, self.settings.beta2
            return [adamw_scalars(lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, step=step)]
        return [(1 - lr * decay, lr * MUON_RMS * max(batch.shape[1:]) ** 0.5, 0.0) for batch in self.batches]
