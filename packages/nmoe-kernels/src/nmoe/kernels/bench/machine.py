"""What produced a figure: device, driver, clocks, versions, command; nothing that names a host, person or folder."""

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_QUERY = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version", "clocks.max.sm", "power.limit")
_PATH_OPTIONS = ("--peer-path", "--output")
_ABSOLUTE = re.compile(r"(?<![\w.])/(?:[^\s/'\",:;)\]]+/)+")


def query_gpu() -> dict[str, Any]:
    """The current device as the driver's tool tells it; empty where there is no such tool or no answer."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_QUERY)}"]
    try:
        told = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY, (part.strip() for part in told.strip().split(",")), strict=False))


def describe_gpu() -> dict[str, Any]:
    """Name, multiprocessors, memory, driver and limits of the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    told = query_gpu()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": told.get("driver_version"),
        "sm_clock_max_mhz": told.get("clocks.max.sm"),
        "power_limit_w": told.get("power.limit"),
    }


def clocks() -> dict[str, Any]:
    """SM and memory clocks in MHz, temperature in °C, power in W."""
    told = query_gpu()
    names = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "power.draw": "watts"}
    return {name: told[key] for key, name in names.items() if key in told}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of torch, Triton, torch's CUDA, and the `packages` that are installed."""
    found = {"cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, without the folders in it."""
    words = ["python", "-m", "nmoe.kernels.bench"]
    option = ""
    for word in arguments:
        name, equals, value = word.partition("=")
        if equals and name in _PATH_OPTIONS:
            words.append(f"{name}={Path(value).name}")
        elif option in _PATH_OPTIONS:
            words.append(Path(word).name)
        else:
            words.append(word)
        option = word
    return shlex.join(words)


def without_folders(text: str) -> str:
    """`text` with each absolute path cut to its last part."""
    return _ABSOLUTE.sub("", text)
