"""What a transport's exchange of one MoE layer is asked for, whatever moves the rows.

Shapes: T tokens of this rank, D width, F expert width, e experts of this rank, K slots, R most routed rows.
"""

from typing import NamedTuple, Protocol

import torch
from nmoe.kernels.ops import Tier
from nmoe.kernels.reference.exchange import Plan, Returns, Slab


class Gradients(NamedTuple):
    """What a backward gives."""

    dx_TD: torch.Tensor
    dgate_TK: torch.Tensor
    dw13_e2FD: torch.Tensor | None
    """None where the weight's `main_grad` has it, or none was asked for."""
    dw2_eDF: torch.Tensor | None


class Kept(NamedTuple):
    """What a forward keeps for its backward beside the slab."""

    plan: Plan
    rows: tuple[torch.Tensor, ...]
    """The tier's index of the rows that came to this rank."""
    pre_R2F: torch.Tensor
    """Their pre-activations; empty unless a backward was said to follow."""


class Exchange(Protocol):
    """Dispatch, experts, return and combine, forward and backward. All ranks call them in one order.

    Each way is two calls, between which the caller may compute something else while rows travel.
    """

    tier: Tier
    """Of the ops that it is made of."""

    def problems(self, dim: int, hidden: int, top_k: int, slab_rows: int, capacity: int) -> list[str]:
        """Why it cannot serve layers of these sizes: width, expert width, K, slab rows W·N, most rows R."""
        ...

    def send(
        self, slab: Slab, x_TD: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor, n_local: int
    ) -> Plan:
        """Sends tokens to the owners of their experts, as soon as those have read what the slab held.

        Args:
            slab: where tokens land; what it holds is kept for the backward.
            x_TD: tokens; as they are until `finish`.
            expert_TK: global experts.
            gate_TK: their weights; as they are until `finish`.
            n_local: e.
        """
        ...

    def finish(
        self,
        slab: Slab,
        returns: Returns,
        capacity: int,
        plan: Plan,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, Kept]:
        """The gated sum of each token's experts, (T, D).

        Args:
            slab: where tokens landed.
            returns: where sums land.
            capacity: most rows R of this rank's experts. More are a fault, and the output then means nothing.
            plan: of `send`.
            w13_e2FD: gate and up projections of this rank's experts.
            w2_eDF: their down projections.
            keep: whether a backward will follow.
        """
        ...

    def send_gradients(self, slab: Slab, gradients: Slab, plan: Plan, dout_TD: torch.Tensor) -> None:
        """Sends the tokens' gradients where the tokens went, to `gradients`. No token is sent again."""
        ...

    def finish_gradients(
        self,
        slab: Slab,
        gradients: Slab,
        returns: Returns,
        kept: Kept,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> Gradients:
        """The backward of `send` and `finish`."""
        ...
