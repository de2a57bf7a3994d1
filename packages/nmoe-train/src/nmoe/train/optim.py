"""The optimizers: AdamW and Muon over named parameters, with fp32 masters.

Weights in bf16 carry a 16-bit residual that makes them exact fp32 masters (`nmoe.kernels.reference.master`). Muon
follows Moonlight (arXiv:2502.16982): Nesterov momentum, Newton-Schulz, updates scaled to AdamW's typical size by
`0.2 · sqrt(max(rows, columns))`, decoupled decay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.adamw import AdamWStep
from nmoe.kernels.reference.master import load_master, store_master
from nmoe.kernels.reference.newton_schulz import newton_schulz
from nmoe.model.transformer import Role, parameter_role
from nmoe.train.schema import OptimConfig
from torch import nn

Kind = Literal["adamw", "muon"]

MUON_BATCH_ELEMENTS = 1 << 20
"""Bound on a batch of several parameters' matrices; a larger parameter is a batch of its own."""

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


class Optimizer:
    """Updates parameters from their accumulated fp32 gradients. Its state is named tensors, fit for a checkpoint."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, ops: Ops) -> None:
        self.config, self.ops, self.parameters = config, ops, dict(parameters)
        self.settings = {name: group_settings(config, parameter_role(name)) for name in self.parameters}
        self.muon_batches = self._batch_by_shape()
        self.state: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if parameter.dtype == torch.bfloat16:
                self.state[f"{name}/residual"] = torch.zeros_like(parameter, dtype=torch.int16)
            moments = ("exp_avg", "exp_avg_sq") if self.settings[name].kind == "adamw" else ("momentum",)
            for moment in moments:
                self.state[f"{name}/{moment}"] = torch.zeros_like(parameter, dtype=wide)

    @torch.no_grad()
    def step(self, grads: Mapping[str, torch.Tensor], *, step: int, lr_factor: float, grad_scale: torch.Tensor) -> None:
        """One update of every parameter.

        Args:
            grads: fp32 gradients by parameter name; left as they are.
            step: the update's number, from 1.
            lr_factor: of every group's learning rate.
            grad_scale: scalar on the device that multiplies every gradient.
        """
        for name, parameter in self.parameters.items():
            settings = self.settings[name]
            if settings.kind == "muon":
                continue
            scalars = AdamWStep(
                lr=settings.lr * lr_factor,
                beta1=self.config.beta1,
                beta2=settings.beta2,
                eps=self.config.eps,
                weight_decay=settings.weight_decay,
                step=step,
            )
            residual = self.state.get(f"{name}/residual")
            exp_avg, exp_avg_sq = self.state[f"{name}/exp_avg"], self.state[f"{name}/exp_avg_sq"]
            self.ops.adamw_(parameter.data, residual, grads[name], exp_avg, exp_avg_sq, grad_scale, scalars)
        for names in self.muon_batches:
            self._muon(names, grads, lr_factor, grad_scale)

    def _batch_by_shape(self) -> list[list[str]]:
        """Muon's parameters in batches of equal matrix shape, so that small matrices share their launches."""
        batches: dict[tuple[int, int], list[list[str]]] = {}
        for name, parameter in self.parameters.items():
            if self.settings[name].kind != "muon":
                continue
            of_shape = batches.setdefault((parameter.shape[-2], parameter.shape[-1]), [[]])
            held = sum(self.parameters[other].numel() for other in of_shape[-1])
            if held and held + parameter.numel() > MUON_BATCH_ELEMENTS:
                of_shape.append([])
            of_shape[-1].append(name)
        return [names for of_shape in batches.values() for names in of_shape]

    def _muon(
        self, names: list[str], grads: Mapping[str, torch.Tensor], lr_factor: float, grad_scale: torch.Tensor
    ) -> None:
        nesterov = []
        for name in names:
            momentum = self.state[f"{name}/momentum"]
            scaled = grads[name] * grad_scale
            momentum.lerp_(scaled, 1 - self.config.muon_momentum)
            nesterov.append(scaled.lerp_(momentum, self.config.muon_momentum).view(-1, *scaled.shape[-2:]))
        matrices = nesterov[0] if len(nesterov) == 1 else torch.cat(nesterov)
        del nesterov
        dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
        updates = newton_schulz(matrices, steps=self.config.muon_steps, dtype=dtype)
        size = MUON_RMS * max(matrices.shape[-2:]) ** 0.5
        counts = [self.parameters[name].numel() // (matrices.shape[-2] * matrices.shape[-1]) for name in names]
        del matrices
        for name, update in zip(names, updates.split(counts), strict=True):
            settings, parameter = self.settings[name], self.parameters[name].data
            lr = settings.lr * lr_factor
            residual = self.state.get(f"{name}/residual")
            master = load_master(parameter, residual)
            master.mul_(1 - lr * settings.weight_decay)
            master.add_(update.view_as(master).to(master.dtype), alpha=-lr * size)
            store_master(master, parameter, residual)
