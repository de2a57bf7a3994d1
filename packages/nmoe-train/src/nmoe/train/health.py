"""Router health: how evenly the experts of each layer are used."""

import torch
from nmoe.model.transformer import Transformer


def router_health(model: Transformer) -> dict[str, float]:
    """Figures of every router since its bias was last updated, tagged `router/<layer>/<figure>`.

    `load_entropy` is over its maximum ln E (1: even); `max_over_mean` of the load (1: even); `dead_experts` got no row;
    `bias_range` is the selection bias's maximum less its minimum. Layers are numbered as in the model, MTP's `mtp0`, ….
    """
    names, rows = [], []
    for name, router in model.routers():
        load = router.load
        share = load / load.sum().clamp_min(1.0)
        entropy = torch.special.entr(share).sum() / torch.log(torch.tensor(float(load.numel())))
        worst = load.max() / load.mean().clamp_min(1e-30)
        dead = (load == 0).sum().to(load.dtype)
        rows.append(torch.stack((entropy.to(load.device), worst, dead, router.bias.max() - router.bias.min())))
        names.append(layer_label(name))
    if not rows:
        return {}
    figures = ("load_entropy", "max_over_mean", "dead_experts", "bias_range")
    values = torch.stack(rows).tolist()  # one copy to the host for all layers
    return {
        f"router/{name}/{figure}": value
        for name, row in zip(names, values, strict=True)
        for figure, value in zip(figures, row, strict=True)
    }


def layer_label(module_name: str) -> str:
    """`layers.3` is `3`; `mtp.0.block` is `mtp0`."""
    kind, number, *_ = module_name.split(".")
    return number if kind == "layers" else f"{kind}{number}"
