"""Evaluation of nmoe checkpoints."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "EvalConfig": "schema",
    "EvalError": "errors",
    "ValidationResult": "validation",
    "ValidationSet": "validation",
    "validate": "validation",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
