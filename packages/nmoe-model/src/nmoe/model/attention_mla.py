"""Multi-head latent attention (DeepSeek-V2 report, arXiv:2405.04434, section 2.1), global or under a sliding window.

Shapes: B batch, S new positions, L all positions (cache included), D model width, H heads, c latent width,
n width without position, r RoPE width, v value width.
"""

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.branches import Branches
from nmoe.model.cache import LayerCache
from nmoe.model.layers import Linear, RMSNorm, Rope, softmax_scale
from nmoe.model.schema import ModelConfig
from torch import nn

LATENT_NORM_EPS = 1e-6
"""Epsilon of the two latent norms in every released DeepSeek and Moonlight model, whatever `norm_eps` is."""


class MultiHeadLatentAttention(nn.Module):
    """Queries of n + r a head; keys and values expanded from one latent a token; one RoPE key shared by all heads."""

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None) -> None:
        super().__init__()
        rank, nope, rope, value = (
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        assert rank, "the schema requires MLA's widths"
        assert nope, "the schema requires MLA's widths"
        assert rope, "the schema requires MLA's widths"
        assert value, "the schema requires MLA's widths"
        self.ops, self.window = ops, window
        self.n_heads, self.nope, self.rope, self.value = config.n_heads, nope, rope, value
        self.scale = softmax_scale(config, nope + rope)
        q_width = config.n_heads * (nope + rope)
        if config.q_lora_rank is None:
            self.wq = Linear(config.dim, q_width)
        else:
            self.wq_a = Linear(config.dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, ops)
            self.wq_b = Linear(config.q_lora_rank, q_width)
        self.has_q_lora = config.q_lora_rank is not None
        self.wkv_a = Linear(config.dim, rank + rope)
        self.kv_norm = RMSNorm(rank, LATENT_NORM_EPS, ops)
        self.wkv_b = Linear(rank, config.n_heads * (nope + value))
        self.wo = Linear(config.n_heads * value, config.dim)

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
        q_BSHd = (self.wq_b(self.q_norm(self.wq_a(x_BSD))) if self.has_q_lora else self.wq(x_BSD)).unflatten(
            -1, (self.n_heads, -1)
        )
        latent, k_rope = self.wkv_a(x_BSD).split((self.wkv_b.weight.shape[1], self.rope), dim=-1)
        latent_BSc, k_rope_BSr = self.kv_norm(latent), self.ops.rope(k_rope[:, :, None], *rope)[:, :, 0]
        if cache is not None:
            latent_BSc, k_rope_BSr = cache.append(latent_BSc, k_rope_BSr)
        if latent_BSc.shape[1] > x_BSD.shape[1]:
            out_BSHv = self._attend_in_latent_space(q_BSHd, latent_BSc, k_rope_BSr, rope, document_start_BS)
        else:
            out_BSHv = self._attend(q_BSHd, latent_BSc, k_rope_BSr, rope, document_start_BS, branches)
        return self.wo(out_BSHv.flatten(2))

    def _attend(
        self,
        q_BSHd: torch.Tensor,
        latent_BSc: torch.Tensor,
        k_rope_BSr: torch.Tensor,
        rope: Rope,
        document_start_BS: torch.Tensor | None,
        branches: Branches | None,
    ) -> torch.Tensor:
        kv_BSHx = self.wkv_b(latent_BSc).unflatten(-1, (self.n_heads, -1))
        q_BHSd, k_BHSd, v_BHSv = self.ops.mla_heads(q_BSHd, kv_BSHx, k_rope_BSr, *rope)
        if branches is not None:
            out_BHSv = branches.attend(self.ops.attention, q_BHSd, k_BHSd, v_BHSv, scale=self.scale, window=self.window)
        else:
            out_BHSv = self.ops.attention(
                q_BHSd, k_BHSd, v_BHSv, scale=self.scale, window=self.window, document_start_BS=document_start_BS
            )
        return out_BHSv.transpose(1, 2)

    def _attend_in_latent_space(
        self,
        q_BSHd: torch.Tensor,
        latent_BLc: torch.Tensor,
        k_rope_BLr: torch.Tensor,
        rope: Rope,
        document_start_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """Decoding: the key projection moves to the query and the value projection to the output, so that the cached
        latents are used as they are, not expanded to H heads at every token."""
        q_nope_BSHn, q_rope_BSHr = q_BSHd.split((self.nope, self.rope), dim=-1)
        q_rope_BHSr = self.ops.rope(q_rope_BSHr, *rope).transpose(1, 2)
        wk_Hnc, wv_Hvc = self.wkv_b.weight.unflatten(0, (self.n_heads, -1)).split((self.nope, self.value), dim=1)
        q_BHSx = torch.cat((torch.einsum("bshn,hnc->bhsc", q_nope_BSHn, wk_Hnc), q_rope_BHSr), dim=-1)
        k_BHLx = torch.cat((latent_BLc, k_rope_BLr), dim=-1)[:, None].expand(-1, self.n_heads, -1, -1)
        v_BHLc = latent_BLc[:, None].expand(-1, self.n_heads, -1, -1)
        out_BHSc = self.ops.attention(
            q_BHSx, k_BHLx, v_BHLc, scale=self.scale, window=self.window, document_start_BS=document_start_BS
        )
        return torch.einsum("bhsc,hvc->bshv", out_BHSc, wv_Hvc)
