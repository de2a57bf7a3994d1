"""RDEP: expert parallelism by direct writes into the expert owner's buffer."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "RdepConfig": "schema",
    "RdepError": "errors",
    "Transport": "transport",
    "TransportUnavailableError": "errors",
    "open_transport": "transport",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
