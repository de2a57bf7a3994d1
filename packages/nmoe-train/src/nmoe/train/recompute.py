"""Layers that compute their forward again in the backward: what that costs, and which are enough. Imports no torch.

What it saves is in `nmoe.train.memory`.
"""

from collections.abc import Sequence
from math import prod

from nmoe.model.count import attention_flops, flops_per_token, parameter_shapes
from nmoe.model.schema import ModelConfig
from nmoe.train.memory import predict_memory, saved_by_recomputing
from nmoe.train.schema import TrainingConfig


def with_recomputed(config: TrainingConfig, layers: Sequence[int]) -> TrainingConfig:
    """The configuration with other `train.recompute_layers`."""
    train = config.train.model_copy(update={"recompute_layers": tuple(layers)})
    return config.model_copy(update={"train": train})


def forward_flops(model: ModelConfig, layer: int, seq_len: int) -> float:
    """FLOPs of a layer's forward per token, counted as `nmoe.model.count.flops_per_token` counts: twice what a token
    meets of its parameters, and causal attention. MTP's modules are numbered on from the trunk's layers."""
    prefix = f"layers.{layer}." if layer < model.n_layers else f"mtp.{layer - model.n_layers}."
    active = 0.0
    for name, shape in parameter_shapes(model).items():
        if name.startswith(prefix):
            share = (model.n_activated_experts or 0) / shape[0] if ".experts." in name else 1.0
            active += share * prod(shape)
    return 2 * active + attention_flops(model, layer, seq_len)


def recompute_share(config: TrainingConfig) -> float:
    """FLOPs of the forwards that are computed again, as a share of the step's without them (the model's FLOPs)."""
    model, seq_len = config.model, config.train.seq_len
    again = sum(forward_flops(model, layer, seq_len) for layer in config.recomputed_layers)
    return again / flops_per_token(model, seq_len)


def enough_layers(config: TrainingConfig, limit: int) -> tuple[int, ...] | None:
    """Layers whose recomputation brings `predict_memory` within `limit` bytes; None if that of all layers does not.

    They are chosen by bytes saved per FLOP, the first layers first: by the time that these are computed again, the
    backwards of those behind them have freed what they kept. None of the choice can be left out.
    """
    model, seq_len = config.model, config.train.seq_len

    def rate(layer: int) -> float:
        return saved_by_recomputing(config, layer) / forward_flops(model, layer, seq_len)

    def fits(layers: Sequence[int]) -> bool:
        return predict_memory(with_recomputed(config, layers)).total <= limit

    order = sorted(range(model.n_layers + model.mtp_depth), key=lambda layer: (-rate(layer), layer))
    count = next((count for count in range(len(order) + 1) if fits(order[:count])), None)
    if count is None:
        return None
    chosen = order[:count]
    for layer in reversed(order[:count]):
        others = [other for other in chosen if other != layer]
        chosen = others if fits(others) else chosen
    return tuple(sorted(chosen))
