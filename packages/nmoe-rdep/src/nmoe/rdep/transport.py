"""Transports: how token rows reach the rank that owns their experts, and how outputs come back.

Shapes: T tokens, D model width, F expert width, E experts in all, e experts on this rank, K experts per token.
"""

from typing import Any, Protocol

import torch
from nmoe.kernels.ops import Ops
from nmoe.rdep.errors import TransportUnavailableError
from nmoe.rdep.schema import RdepConfig


class Transport(Protocol):
    """Dispatch, experts, return and combine of one MoE layer."""

    def routed_experts(
        self,
        ops: Ops,
        x_TD: torch.Tensor,
        routing: Any,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated sum of each token's experts, (T, D), and this rank's load, int32 (E) rows a global expert.

        `routing` is what `ops.route` gave for the tokens.
        """
        ...


class LocalTransport:
    """One rank owns every expert: nothing is copied, the experts gather their rows from x itself."""

    def routed_experts(
        self,
        ops: Ops,
        x_TD: torch.Tensor,
        routing: Any,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Transport.routed_experts`."""
        index = ops.index_rows(routing, w13_e2FD.shape[0])
        return ops.experts(x_TD, index, routing.gate_TK, w13_e2FD, w2_eDF), index.offset_E.diff()


def open_transport(config: RdepConfig, world_size: int) -> Transport:
    """The transport of a run.

    Raises:
        TransportUnavailableError: this version has no such transport.
    """
    if config.transport != "local" or world_size != 1:
        raise TransportUnavailableError(
            f"expected rdep.transport = 'local' and runtime.world_size = 1, the only ones that this version can run; "
            f"found '{config.transport}' and {world_size}: train on one GPU with --set rdep.transport=local "
            "--set runtime.world_size=1"
        )
    return LocalTransport()
