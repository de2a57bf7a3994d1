"""Feed-forward parts of a block: the dense SwiGLU MLP and the mixture of experts.

Shapes: B batch, S sequence, T = B·S tokens, D model width, F hidden width, E experts in all, e experts on this rank,
K experts per token.
"""

from typing import NamedTuple

import torch
from nmoe.kernels.linear import linear
from nmoe.kernels.ops import Ops
from nmoe.kernels.router import router_logits_and_tokens
from nmoe.model.schema import ModelConfig
from nmoe.rdep.transport import Transport
from torch import nn


class Mlp(nn.Module):
    """`w2(silu(w1 x) · w3 x)`; gate and up are one product."""

    def __init__(self, width: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.w13 = nn.Parameter(torch.empty(2, hidden, width))
        self.w2 = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) to (…, D)."""
        return linear(self.ops.swiglu(linear(x, self.w13)), self.w2)


class Experts(nn.Module):
    """Weights of the routed experts that this rank owns: rank r has experts `r·e` to `r·e + e - 1`.

    Attributes:
        n_experts: E.
        first: the global id of the first expert here.
    """

    def __init__(self, n_experts: int, width: int, hidden: int, transport: Transport) -> None:
        super().__init__()
        here = transport.n_local(n_experts)
        self.n_experts, self.first = n_experts, transport.world.rank * here
        self.w13 = nn.Parameter(torch.empty(here, 2, hidden, width))
        self.w2 = nn.Parameter(torch.empty(here, width, hidden))


class Router(nn.Module):
    """Logits in fp32, whatever the model's precision: weight and bias stay fp32 too."""

    bias: torch.Tensor
    load: torch.Tensor
    """Rows of this rank's tokens that each expert got in the training losses since the last `update_bias`; whoever sums
    them over ranks does so before it."""

    def __init__(self, config: ModelConfig, n_experts: int) -> None:
        super().__init__()
        self.config = config
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(n_experts, config.dim, dtype=wide))
        self.register_buffer("bias", torch.zeros(n_experts, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(n_experts, dtype=torch.float32), persistent=False)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (T, E) of each token's experts, and x for all that reads it beside the router."""
        return router_logits_and_tokens(x_TD, self.weight)

    @torch.no_grad()
    def update_bias(self, ok: torch.Tensor) -> None:
        """One aux-loss-free step (arXiv:2408.15664): underloaded experts up, overloaded down; the load starts anew.

        Args:
            ok: int32 scalar on the router's device; 0 leaves the bias as it is.
        """
        direction_E = torch.sign(self.load.mean() - self.load)
        self.bias.add_(direction_E * ok, alpha=self.config.router_bias_update_rate)
        self.load.zero_()


class MoeOutput(NamedTuple):
    """What a layer gives: its output, and what its router adds to loss and load. Both are None without experts."""

    out_BSD: torch.Tensor
    balance: torch.Tensor | None = None
    """Sum over sequences of the weighted balance losses; None where the config asks for none, and in evaluation."""
    load_E: torch.Tensor | None = None
    """Rows of this rank's tokens routed to each of all experts, int32. Whoever runs the layer counts them: a layer that
    is computed a second time for its backward must not count them twice."""


class MixtureOfExperts(nn.Module):
    """Routed experts plus shared experts (DeepSeekMoE, arXiv:2401.06066)."""

    def __init__(self, config: ModelConfig, ops: Ops, transport: Transport) -> None:
        super().__init__()
        n_experts, hidden = config.n_routed_experts, config.moe_inter_dim
        assert n_experts, "the schema requires the experts' number"
        assert hidden, "the schema requires the experts' width"
        assert config.n_activated_experts, "the schema requires K of a model with experts"
        self.config, self.ops = config, ops
        self.router = Router(config, n_experts)
        self.experts = Experts(n_experts, config.dim, hidden, transport)
        self.routed = transport.layer(config.dim, config.n_activated_experts, n_experts)
        self.has_shared = config.n_shared_experts > 0
        if self.has_shared:
            self.shared = Mlp(config.dim, hidden * config.n_shared_experts, ops)

    def forward(self, x_BSD: torch.Tensor) -> MoeOutput:
        """(B, S, D) to (B, S, D)."""
        x_TD = x_BSD.flatten(0, 1)
        logits_TE, x_TD = self.router(x_TD)
        routing = self.ops.route(
            logits_TE,
            self.router.bias,
            top_k=self.config.n_activated_experts,
            n_groups=self.config.n_expert_groups,
            n_limited_groups=self.config.n_limited_groups,
            route_scale=self.config.route_scale,
        )
        out_TD, load_E, shared_TD = self.routed(
            self.ops,
            x_TD,
            routing,
            self.experts.w13,
            self.experts.w2,
            beside=lambda: self.shared(x_TD) if self.has_shared else None,
        )
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        balance = self._balance_loss(logits_TE, routing.expert_TK, x_BSD.shape[0]) if self.training else None
        return MoeOutput(out_TD.view_as(x_BSD), balance, load_E)

    def _balance_loss(self, logits_TE: torch.Tensor, expert_TK: torch.Tensor, n_sequences: int) -> torch.Tensor | None:
        per_sequence, per_batch = self.config.seq_balance_loss, self.config.aux_loss
        loss: torch.Tensor | None = None
        if per_sequence:
            # Equation 18 counts the best experts by score alone: the bias must not hide what the scores prefer.
            unbiased = self.ops.route(logits_TE.detach(), torch.zeros_like(self.router.bias), top_k=expert_TK.shape[1])
            loss = self.ops.balance_loss(logits_TE, unbiased.expert_TK, n_sequences=n_sequences, weight=per_sequence)
        if per_batch:
            of_batch = self.ops.balance_loss(logits_TE, expert_TK, n_sequences=1, weight=per_batch * n_sequences)
            loss = of_batch if loss is None else loss + of_batch
        return loss
