"""One transformer block: attention and feed-forward, each after an RMSNorm and beside a residual."""

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.attention_mla import MultiHeadLatentAttention
from nmoe.model.attention_sdpa import MultiHeadAttention
from nmoe.model.branches import Branches
from nmoe.model.cache import LayerCache
from nmoe.model.feed_forward import MixtureOfExperts, Mlp, MoeOutput
from nmoe.model.layers import RMSNorm, Rope
from nmoe.model.schema import ModelConfig
from nmoe.rdep.transport import Transport
from torch import nn


class Block(nn.Module):
    """Layer `layer` of the trunk, or an MTP module's block (numbered on from the trunk)."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, transport: Transport) -> None:
        super().__init__()
        kind = MultiHeadLatentAttention if config.attn == "mla" else MultiHeadAttention
        window = config.attn_local_window if config.is_local(layer) else None
        self.attn_norm = RMSNorm(config.dim, config.norm_eps, ops)
        self.attn = kind(config, ops, window)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, ops)
        self.ffn: Mlp | MixtureOfExperts
        if config.is_dense(layer):
            assert config.inter_dim, "the schema requires inter_dim of a model with dense layers"
            self.ffn = Mlp(config.dim, config.inter_dim, ops)
        else:
            self.ffn = MixtureOfExperts(config, ops, transport)

    def forward(
        self,
        x_BSD: torch.Tensor,
        delta_BSD: torch.Tensor | None,
        rope: Rope,
        cache: LayerCache | None = None,
        document_start_BS: torch.Tensor | None = None,
        branches: Branches | None = None,
    ) -> tuple[torch.Tensor, MoeOutput]:
        """Adds what the layer before left to be added, and leaves its own feed-forward part's output likewise: every
        addition goes with the norm that follows it.

        Args:
            x_BSD: the residual stream.
            delta_BSD: what is still to be added to it; None before the first layer.
            rope: tables of the positions.
            cache: what came before them.
            document_start_BS: see `Transformer.hidden`.
            branches: see `Transformer.hidden`; x is then one row of the tokens of all rows.

        Returns:
            The residual stream up to the feed-forward part, and that part's output, which is still to be added.
        """
        x_BSD, normed_BSD = self.attn_norm.after_adding(x_BSD, delta_BSD)
        attended_BSD = self.attn(normed_BSD, rope, cache, document_start_BS, branches)
        x_BSD, normed_BSD = self.ffn_norm.after_adding(x_BSD, attended_BSD)
        if isinstance(self.ffn, Mlp):
            return x_BSD, MoeOutput(self.ffn(normed_BSD))
        return x_BSD, self.ffn(normed_BSD)
