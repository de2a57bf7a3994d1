"""DeepSeek-shaped MoE language models: MLA, sliding windows, MoE, multi-token prediction."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ModelConfig": "schema",
    "ModelError": "errors",
    "Sampling": "generation",
    "Transformer": "transformer",
    "YarnConfig": "schema",
    "count_parameters": "count",
    "export_hf": "hf",
    "flops_per_token": "count",
    "generate": "generation",
    "import_hf": "hf",
    "open_folder": "checkpoint",
    "read_model": "weights",
    "write_folder": "checkpoint",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
