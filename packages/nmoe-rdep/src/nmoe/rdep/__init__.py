"""RDEP: expert parallelism by direct writes into the expert owner's buffer."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CapacityError": "errors",
    "PeerTimeoutError": "errors",
    "RdepConfig": "schema",
    "RdepError": "errors",
    "SymmetricMemoryError": "errors",
    "Transport": "transport",
    "TransportUnavailableError": "errors",
    "World": "world",
    "WorldError": "errors",
    "alone": "world",
    "join_world": "world",
    "open_transport": "transport",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
