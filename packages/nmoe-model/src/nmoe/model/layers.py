"""Small layers that several parts share: linear, RMSNorm, and the position tables."""

import torch
import torch.nn.functional as F
from nmoe.kernels.linear import linear
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.rope import rope_frequencies, rope_tables, yarn_frequencies, yarn_mscale
from nmoe.model.schema import ModelConfig
from torch import nn

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each fp32 (S, d/2)."""


class Linear(nn.Module):
    """A projection without bias, `x @ weightᵀ`; the weight is drawn by `Transformer.init_weights`."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n_in) to (…, n_out)."""
        return linear(x, self.weight)


class Embedding(nn.Module):
    """Token embedding."""

    def __init__(self, n_ids: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, width))

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """int64 (…) to (…, width)."""
        return F.embedding(token, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, width) to the same."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`x + delta` and its norm, in one pass; x and its norm where delta is None. Use the sum, not x, from there on:
        then the gradients of both meet in the op."""
        return self.ops.add_rms_norm(x, delta, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """cos and sin by position, with YaRN where the config has it. Computed, never saved."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.rope_dim is not None, "the schema requires the head widths of its kind of attention"
        self.dim, self.theta, self.yarn = config.rope_dim, config.rope_theta, config.yarn

    def forward(self, start: int, count: int, device: torch.device) -> Rope:
        """Tables for positions `start` to `start + count - 1`."""
        return self.at(torch.arange(start, start + count, device=device))

    def at(self, position_S: torch.Tensor) -> Rope:
        """Tables for any positions, int64 (S)."""
        yarn, device = self.yarn, position_S.device
        if yarn is None:
            return rope_tables(position_S, rope_frequencies(self.dim, self.theta, device))
        frequencies = yarn_frequencies(
            self.dim,
            self.theta,
            factor=yarn.factor,
            original_seq_len=yarn.original_seq_len,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            device=device,
        )
        ratio = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return rope_tables(position_S, frequencies, ratio)


def softmax_scale(config: ModelConfig, qk_width: int) -> float:
    """`qk_width^-1/2`, times YaRN's temperature squared where the context is extended."""
    scale = qk_width**-0.5
    if config.yarn is not None:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return float(scale)
