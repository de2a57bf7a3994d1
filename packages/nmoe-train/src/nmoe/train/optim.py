"""The optimizers: AdamW and Muon over flat buffers of parameters, with fp32 masters, driven from device memory.

Weights in bf16 carry a 16-bit residual that makes them exact fp32 masters (`nmoe.kernels.reference.master`). Muon
follows Moonlight (arXiv:2502.16982): Nesterov momentum, Newton-Schulz, updates scaled to AdamW's typical size by
`0.2 · sqrt(max(rows, columns))`, decoupled decay.

An update can be captured in a CUDA graph: what changes from step to step is read from device memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.adamw import adamw_scalars
from nmoe.model.tensor_pieces import TensorPiece
from nmoe.model.transformer import Role, parameter_role
from nmoe.rdep.world import World
from nmoe.train.flat import FlatGroup, FlatParameters
from nmoe.train.gradients import Gradients
from nmoe.train.layout import Layout, Shape, cut_anywhere, side_by_side, whole_parameters
from nmoe.train.muon import muon_batches, newton_schulz_cost, weight_runs
from nmoe.train.schema import OptimConfig
from torch import nn

Kind = Literal["adamw", "muon"]

MUON_RMS = 0.2
"""Root mean square of an AdamW update, seen in practice, that Muon's is scaled to (Moonlight, section 2.2)."""


@dataclass(frozen=True)
class GroupSettings:
    """How the parameters of one role are updated."""

    kind: Kind
    lr: float
    beta2: float
    weight_decay: float
    divided: bool = False
    """Whether every rank holds the parameters, and updates a part of them."""


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


def flatten(parameters: Mapping[str, nn.Parameter], config: OptimConfig, world: World) -> FlatParameters[GroupSettings]:
    """Puts the parameters of each settings and dtype into one buffer. Ranks divide what all of them hold: everything
    but the experts."""

    def settings(name: str) -> GroupSettings:
        role = parameter_role(name)
        return replace(group_settings(config, role), divided=world.size > 1 and role != "expert")

    def lay_out(key: GroupSettings, shapes: Mapping[str, Shape]) -> Layout:
        if not key.divided:
            return side_by_side(shapes)
        ranks, rank = world.size, world.rank
        chunk_size = (config.reduce_scatter_chunk_mb << 20) // 4  # of fp32 gradients
        if key.kind == "muon":
            return whole_parameters(shapes, newton_schulz_cost, ranks=ranks, rank=rank, chunk_size=chunk_size)
        return cut_anywhere(shapes, ranks=ranks, rank=rank, chunk_size=chunk_size)

    return FlatParameters(parameters, settings, lay_out, world)


class Optimizer:
    """Updates parameters from their accumulated fp32 gradients: this rank's parts of them, which it then sends to the
    other ranks that hold them.

    Attributes:
        flat: the parameters.
        state: what this rank has of tensors in the parameters' shapes, fit for a checkpoint: `<parameter>/residual`
            beside bf16 weights, `<parameter>/exp_avg` and `/exp_avg_sq` under AdamW, `<parameter>/momentum` under Muon;
            by parameter, in their order. Of experts, shapes and starts are those of this rank's.
    """

    def __init__(self, flat: FlatParameters[GroupSettings], config: OptimConfig, ops: Ops) -> None:
        self.config, self.ops, self.flat = config, ops, flat
        self._groups = [_Group(group) for group in flat.groups]
        n_rows = sum(group.n_rows for group in self._groups)
        self._scalars = torch.full((n_rows, 3), torch.nan, device=flat.groups[0].weight.device)
        held = {name: pieces for group in self._groups for name, pieces in group.state().items()}
        self.state = {name: held[name] for name in flat.parameters}

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
        """One update of every parameter, with the numbers of the last `set_step`. All ranks make it together.

        Args:
            gradients: of the parameters; left as they are.
            grad_scale: scalar on the device that multiplies every gradient; the same on all ranks.
            ok: int32 scalar on the device; 0: weights and state keep their bits, whatever the gradients hold. The same
                on all ranks.
        """
        row = 0
        for group, grad in zip(self._groups, gradients.sums, strict=True):
            rows = self._scalars[row : row + group.n_rows]
            row += group.n_rows
            if group.settings.kind == "muon":
                self._muon(group, grad, grad_scale, ok, rows)
            else:
                self._adamw(group, grad, grad_scale, ok, rows[0])
            group.flat.gather_weights()

    def _adamw(
        self, group: "_Group", grad: torch.Tensor, grad_scale: torch.Tensor, ok: torch.Tensor, scalars: torch.Tensor
    ) -> None:
        for span in group.flat.layout.spans():
            here = slice(span.at, span.at + span.size)
            self.ops.adamw_(
                group.flat.weight[span.start : span.start + span.size],
                None if group.residual is None else group.residual[here],
                grad[here],
                group.moments["exp_avg"][here],
                group.moments["exp_avg_sq"][here],
                grad_scale,
                ok,
                scalars,
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
            for run in weight_runs(group.flat, batch):
                rest = None if residual is None else residual[run.matrices]
                ops.muon_apply_(run.weight, rest, update[run.matrices], ok, row[:2])


class _Group:
    """The shards of a group, and the numbers of its next update: a row for AdamW, one for each of Muon's batches."""

    def __init__(self, flat: FlatGroup[GroupSettings]) -> None:
        self.settings, self.flat = flat.key, flat
        self.residual = flat.shard_zeros(torch.int16) if flat.dtype == torch.bfloat16 else None
        kinds = ("exp_avg", "exp_avg_sq") if flat.key.kind == "adamw" else ("momentum",)
        wide = torch.promote_types(flat.dtype, torch.float32)
        self.moments = {kind: flat.shard_zeros(wide) for kind in kinds}
        self.batches = muon_batches(flat) if flat.key.kind == "muon" else []

    @property
    def n_rows(self) -> int:
        """Rows of `scalars`."""
        return 1 if self.settings.kind == "adamw" else len(self.batches)

    def state(self) -> dict[str, list[TensorPiece]]:
        """By parameter."""
        shards = self.moments if self.residual is None else {"residual": self.residual, **self.moments}
        return {
            name: [
                TensorPiece(f"{name}/{kind}", tuple(shape), first, part)
                for kind, shard in shards.items()
                for first, part in self.flat.parts(shard, name) or [(0, shard[:0])]  # nothing here, of a known tensor
            ]
            for name, shape in self.flat.shapes.items()
        }

    def scalars(self, config: OptimConfig, step: int, lr_factor: float) -> list[tuple[float, float, float]]:
        """The numbers of an update, in double precision, three a row."""
        lr, decay = self.settings.lr * lr_factor, self.settings.weight_decay
        if self.settings.kind == "adamw":
            beta1, beta2 = config.beta1, self.settings.beta2
            return [adamw_scalars(lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, step=step)]
        return [(1 - lr * decay, lr * MUON_RMS * max(batch.shape[1:]) ** 0.5, 0.0) for batch in self.batches]
