"""MoE kernels for PyTorch: references for every op, and the fast path for the GPU at hand."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "KernelError": "errors",
    "Ops": "ops",
    "ShapeError": "errors",
    "UnsupportedArchError": "errors",
    "detect_arch": "arch",
    "device_limits": "arch",
    "linear_cross_entropy": "reference.cross_entropy",
    "router_logits": "router",
    "select_ops": "ops",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
