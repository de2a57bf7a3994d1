"""Plain multi-head attention with RoPE and optional QK norm, global or under a sliding window.

Shapes: B batch, S new positions, L all positions (cache included), D model width, H heads, d head width.
"""

import torch
from nmoe.kernels.linear import linear
from nmoe.kernels.ops import Ops
from nmoe.model.branches import Branches
from nmoe.model.cache import LayerCache
from nmoe.model.layers import Linear, RMSNorm, Rope, softmax_scale
from nmoe.model.schema import ModelConfig
from torch import nn


class MultiHeadAttention(nn.Module):
    """As many key-value heads as query heads; queries, keys and values are one product."""

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None) -> None:
        super().__init__()
        assert config.head_dim, "the schema requires head_dim"
        self.ops, self.window, self.n_heads = ops, window, config.n_heads
        self.scale = softmax_scale(config, config.head_dim)
        width = config.n_heads * config.head_dim
        self.wqkv = nn.Parameter(torch.empty(3, width, config.dim))
        self.wo = Linear(width, config.dim)
        self.has_qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        document_start_BS: torch.Tensor | None = None,
        branches: Branches | None = None,
    ) -> torch.Tensor:
        """(B, S, D) to (B, S, D); with a cache, x continues what it holds. Documents are as `Transformer.hidden` has
        them. With branches, x is one row of the tokens of all rows."""
        qkv_BS3Hd = linear(x_BSD, self.wqkv).unflatten(-1, (3, self.n_heads, -1))
        gains = (self.q_norm.weight, self.k_norm.weight) if self.has_qk_norm else None
        q_BHSd, k_BHLd, v_BHLd = self.ops.qkv_heads(qkv_BS3Hd, gains, self.norm_eps, *rope)
        if cache is not None:
            k_BLHd, v_BLHd = cache.append(k_BHLd.transpose(1, 2), v_BHLd.transpose(1, 2))
            k_BHLd, v_BHLd = k_BLHd.transpose(1, 2), v_BLHd.transpose(1, 2)
        if branches is not None:
            out_BHSd = branches.attend(self.ops.attention, q_BHSd, k_BHLd, v_BHLd, scale=self.scale, window=self.window)
        else:
            out_BHSd = self.ops.attention(
                q_BHSd, k_BHLd, v_BHLd, scale=self.scale, window=self.window, document_start_BS=document_start_BS
            )
        return self.wo(out_BHSd.transpose(1, 2).flatten(2))
