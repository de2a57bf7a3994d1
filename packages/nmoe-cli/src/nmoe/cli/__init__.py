"""The `n` command: train, evaluate, generate, import and export MoE language models."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CliError": "errors",
    "ConfigError": "errors",
    "ExitCode": "errors",
    "LoadedConfig": "config",
    "RunConfig": "config",
    "dump_toml": "toml_writer",
    "fingerprint": "fingerprint",
    "load_config": "config",
    "main": "app",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
