"""Plain multi-head attention with RoPE and optional QK norm, global or under a sliding window.

Shapes: B batch, S new positions, L all positions (cache included), D model width, H heads, d head width.
"""

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.cache import LayerCache
from nmoe.model.layers import Linear, RMSNorm, Rope, softmax_scale
from nmoe.model.schema import ModelConfig
from torch import nn


class MultiHeadAttention(nn.Module):
    """As many key-value heads as query heads."""

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None) -> None:
        super().__init__()
        assert config.head_dim, "the schema requires head_dim"
        self.ops, self.window, self.n_heads = ops, window, config.n_heads
        self.scale = softmax_scale(config, config.head_dim)
        width = config.n_heads * config.head_dim
        self.wq, self.wk, self.wv = (Linear(config.dim, width) for _ in range(3))
        self.wo = Linear(width, config.dim)
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops)

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        """(B, S, D) to (B, S, D); with a cache, x continues what it holds."""
        q, k, v_BSHd = (w(x_BSD).unflatten(-1, (self.n_heads, -1)) for w in (self.wq, self.wk, self.wv))
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHd, k_BSHd = self.ops.rope(q, *rope), self.ops.rope(k, *rope)
        if cache is not None:
            k_BSHd, v_BSHd = cache.append(k_BSHd, v_BSHd)
        q_BHSd, k_BHSd, v_BHSd = (x.transpose(1, 2) for x in (q_BSHd, k_BSHd, v_BSHd))
        out_BHSd = self.ops.attention(q_BHSd, k_BHSd, v_BHSd, scale=self.scale, window=self.window)
        return self.wo(out_BHSd.transpose(1, 2).flatten(2))
