"""The `[rdep]` section. Imports no torch."""

from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

ROWS = 256
"""Capacities are multiples of it."""

TransportName = Literal["local", "ipc", "shm"]


class RdepConfig(BaseModel):
    """How token rows reach the ranks that own their experts. Nothing here decides what is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transport: TransportName | None = None
    """`local`: one rank, nothing moves. `ipc`: CUDA IPC between the GPUs of a host. `shm`: shared memory between ranks
    on the CPUs of a host. Absent: the one that ranks and device need."""
    capacity_factor: Annotated[float, Field(ge=1.0)] | None = None
    """Rows of scratch for a rank's experts, over the rows of even routing. More rows than that are an error that names
    the factor to set. Absent: room for whatever routers choose, as new ones may send every token to the same experts;
    a smaller factor saves memory once they have learnt to spread them."""
    timeout_s: PositiveFloat = 300.0
    """Seconds that a rank waits for another before it names the one that is missing."""

    def transport_for(self, world_size: int, device: Literal["cpu", "cuda"]) -> TransportName:
        """The transport of `world_size` ranks on `device`: the one that is set, or else the one that they need."""
        if self.transport is not None:
            return self.transport
        if world_size == 1:
            return "local"
        return "ipc" if device == "cuda" else "shm"

    def row_capacity(self, tokens: int, top_k: int, n_local: int, world_size: int) -> int:
        """Most rows of a rank's experts, a multiple of `ROWS`, or as many as there can be.

        Args:
            tokens: of a rank, at most.
            top_k: experts a token.
            n_local: experts of a rank.
            world_size: ranks.
        """
        most = world_size * tokens * min(top_k, n_local)
        if self.capacity_factor is None:
            return most
        return min(most, ceil(self.capacity_factor * tokens * top_k / ROWS) * ROWS)

    def problems(self, world_size: int, device: Literal["cpu", "cuda"]) -> list[str]:
        """What does not go together of this section, `runtime.world_size` and `runtime.device`, in words."""
        if self.transport is None:
            return []
        needed = RdepConfig().transport_for(world_size, device)
        if self.transport == needed:
            return []
        serves = {"local": "one rank", "ipc": "several ranks on GPUs", "shm": "several ranks on CPUs"}[self.transport]
        return [
            f"rdep.transport = '{self.transport}' serves {serves}, found runtime.world_size = {world_size} and "
            f"runtime.device = '{device}': use '{needed}', or leave out rdep.transport"
        ]
