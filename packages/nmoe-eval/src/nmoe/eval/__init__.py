"""Evaluation of nmoe checkpoints."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Engine": "engine",
    "EvalConfig": "schema",
    "EvalError": "errors",
    "Results": "results",
    "Sources": "sources",
    "ValidationResult": "validation",
    "ValidationSet": "validation",
    "evaluate": "runner",
    "validate": "validation",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
