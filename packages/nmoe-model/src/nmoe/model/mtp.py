"""Multi-token prediction (DeepSeek-V3 report, section 2.2, equations 21 to 25).

Shapes: B batch, S positions of this depth, D model width.
"""

import torch
from nmoe.kernels.ops import Ops
from nmoe.model.block import Block
from nmoe.model.feed_forward import MoeOutput
from nmoe.model.layers import Linear, RMSNorm, Rope
from nmoe.model.schema import ModelConfig
from nmoe.rdep.transport import Transport
from torch import nn


class MtpModule(nn.Module):
    """Depth k: predicts token i + k + 1 from the state of depth k - 1 at i and the embedding of token i + k.

    Embedding and head are the trunk's. The state that enters is normalised already (the trunk's after its final norm, a
    depth's after its own), as the released models do it.
    """

    def __init__(self, config: ModelConfig, depth: int, ops: Ops, transport: Transport) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps, ops)
        self.embed_norm = RMSNorm(config.dim, config.norm_eps, ops)
        self.proj = Linear(2 * config.dim, config.dim)
        self.block = Block(config, config.n_layers + depth - 1, ops, transport)
        self.norm = RMSNorm(config.dim, config.norm_eps, ops)

    def forward(
        self,
        state_BSD: torch.Tensor,
        embedding_BSD: torch.Tensor,
        rope: Rope,
        document_start_BS: torch.Tensor | None = None,
    ) -> MoeOutput:
        """Equations 21 and 22, then this depth's final norm: the state that the shared head reads.

        Args:
            state_BSD: the previous depth's states at positions i.
            embedding_BSD: embeddings of tokens i + k.
            rope: tables of positions i.
            document_start_BS: for each position i the first one of its own document, which is the trunk's: not that of
                token i + k. A position whose target, token i + k + 1, is in its document then sees only positions whose
                own token i + k is too, and so gives what the document alone would. The last k positions of a document
                read embeddings of the next one's tokens, which only they see.
        """
        joined = torch.cat((self.hidden_norm(state_BSD), self.embed_norm(embedding_BSD)), dim=-1)
        x_BSD, out = self.block(self.proj(joined), None, rope, None, document_start_BS)
        return out._replace(out_BSD=self.norm.after_adding(x_BSD, out.out_BSD)[1])
