"""The nmoe training loop: optimizers, schedules, exact resume, metrics."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Experiments": "experiments",
    "Outcome": "loop",
    "RunFolder": "run_folder",
    "TrainError": "errors",
    "TrainingConfig": "schema",
    "predict_memory": "memory",
    "read_metrics": "metrics",
    "train": "loop",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
