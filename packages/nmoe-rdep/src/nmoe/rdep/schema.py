"""The `[rdep]` section. Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class RdepConfig(BaseModel):
    """How token rows reach the ranks that own their experts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transport: Literal["local", "ipc"] = "local"
    """`local`: one rank, nothing moves. `ipc`: CUDA IPC between the processes of a host."""
