"""Transports: how token rows reach the rank that owns their experts, and how outputs come back.

Shapes: T tokens of this rank, D model width, F expert width, E experts in all, e experts on this rank, K experts per
token, W ranks.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import torch
from nmoe.kernels.ops import Ops
from nmoe.rdep.errors import TransportUnavailableError
from nmoe.rdep.faults import Faults
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.world import World, alone

Beside = TypeVar("Beside")


class ExpertLayer(Protocol):
    """Dispatch, experts, return and combine of one MoE layer."""

    def __call__(
        self,
        ops: Ops,
        x_TD: torch.Tensor,
        routing: Any,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        beside: Callable[[], Beside],
    ) -> tuple[torch.Tensor, torch.Tensor, Beside]:
        """The gated sum of each token's experts, (T, D), and int32 (E), rows of this rank's tokens by global expert.

        `routing` is what `ops.route` gave for the tokens. Of W ranks, rank r gives the weights of experts `r·e` to
        `r·e + e - 1`, all ranks call their layers in one order, and each backward comes before the layer's next call.
        `beside` computes something else while rows travel, and so does its backward; its result comes last.
        """
        ...


class Transport(Protocol):
    """What a model's MoE layers share."""

    world: World
    faults: Faults
    """What went wrong on this rank: to be looked at whenever a step's figures are."""

    def layer(self, dim: int, top_k: int, n_experts: int) -> ExpertLayer:
        """One MoE layer. Every rank makes its layers in one order."""
        ...

    def n_local(self, n_experts: int) -> int:
        """How many of `n_experts` experts this rank owns."""
        ...

    @property
    def shared_bytes(self) -> int:
        """Bytes of this rank's memory that all ranks map; PyTorch's allocator does not know of them."""
        ...

    def close(self) -> None:
        """Gives back what the ranks share. Twice does no harm."""
        ...


class LocalTransport:
    """One rank owns every expert: nothing is copied, the experts gather their rows from x itself."""

    def __init__(self, world: World | None = None) -> None:
        self.world = alone("cpu") if world is None else world
        self.faults = Faults(self.world.device, timeout_s=0.0)

    def layer(self, dim: int, top_k: int, n_experts: int) -> ExpertLayer:
        """See `Transport.layer`."""
        return _local_layer

    def n_local(self, n_experts: int) -> int:
        """All."""
        return n_experts

    @property
    def shared_bytes(self) -> int:
        """None."""
        return 0

    def close(self) -> None:
        """There is nothing to give back."""


def _local_layer(
    ops: Ops,
    x_TD: torch.Tensor,
    routing: Any,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
    beside: Callable[[], Beside],
) -> tuple[torch.Tensor, torch.Tensor, Beside]:
    index = ops.index_rows(routing, w13_e2FD.shape[0])
    return ops.experts(x_TD, index, routing.gate_TK, w13_e2FD, w2_eDF), index.offset_E.diff(), beside()


def open_transport(config: RdepConfig, world: World, *, max_tokens: int, dtype: torch.dtype) -> Transport:
    """The transport of a run.

    Args:
        config: the `[rdep]` section.
        world: the ranks.
        max_tokens: the most tokens that a rank gives a layer at once.
        dtype: of the tokens.

    Raises:
        TransportUnavailableError: the ranks or their devices cannot use it.
        SymmetricMemoryError: the memory that the ranks share cannot be had.
    """
    device: Literal["cpu", "cuda"] = "cuda" if world.device.type == "cuda" else "cpu"
    if problems := config.problems(world.size, device):
        raise TransportUnavailableError("; ".join(problems))
    if config.transport_for(world.size, device) == "local":
        return LocalTransport(world)
    from nmoe.rdep.expert_parallel import ExpertParallel

    return ExpertParallel(config, world, max_tokens=max_tokens, dtype=dtype)
