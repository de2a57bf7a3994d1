"""Router health: how evenly the experts of each layer are used."""

import math
from collections.abc import Sequence

import torch
from nmoe.model.transformer import Transformer

FIGURES = ("load_entropy", "max_over_mean", "dead_experts", "bias_range")
"""`load_entropy` is over its maximum ln E (1: even); `max_over_mean` of the load (1: even); `dead_experts` got no row;
`bias_range` is the selection bias's maximum less its minimum."""


def router_figures(model: Transformer) -> torch.Tensor:
    """`FIGURES` of every router since its bias was last updated, fp32 (routers, 4), on their device."""
    routers = [router for _, router in model.routers()]
    if not routers:
        return torch.zeros(0, len(FIGURES))
    load_LE = torch.stack([router.load for router in routers])
    bias_LE = torch.stack([router.bias for router in routers])
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp_min(1.0)
    entropy = torch.special.entr(share_LE).sum(1) / math.log(load_LE.shape[1])
    worst = load_LE.amax(1) / load_LE.mean(1).clamp_min(1e-30)
    dead = (load_LE == 0).sum(1).to(load_LE.dtype)
    return torch.stack((entropy, worst, dead, bias_LE.amax(1) - bias_LE.amin(1)), dim=1)


def health_tags(model: Transformer, values: Sequence[float]) -> dict[str, float]:
    """Flattened `router_figures` as metrics `router/<layer>/<figure>`. Layers are numbered as in the model, MTP's
    `mtp0`, …."""
    names = [f"router/{layer_label(name)}/{figure}" for name, _ in model.routers() for figure in FIGURES]
    return dict(zip(names, values, strict=True))


def layer_label(module_name: str) -> str:
    """`layers.3` is `3`; `mtp.0.block` is `mtp0`."""
    kind, number, *_ = module_name.split(".")
    return number if kind == "layers" else f"{kind}{number}"
