"""What this machine can run, found by trying it."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from nmoe.cli.units import format_bytes

Device = Literal["cpu", "cuda"]
_MIN_FREE_BYTES = 2**30
_PROBE_ARCH = "sm_90a"


class Status(Enum):
    """How a part of the machine stands."""

    OK = "ok"
    MISSING = "missing"
    """Not there, and not needed for the chosen device."""
    BROKEN = "broken"
    """Needed for the chosen device, and unusable."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Status
    found: str
    means: str = ""
    """What follows from it, and what to do; empty where all is well."""


def diagnose(device: Device | None, data_root: Path) -> Iterator[Check]:
    """Every finding, as soon as it is made.

    Args:
        device: what the machine is meant for. None: `cuda` where an NVIDIA driver is installed, else `cpu`.
        data_root: where runs would be written.
    """
    chosen: Device = device or ("cuda" if nvidia_driver() else "cpu")
    yield Check("device", Status.OK, chosen if device else f"{chosen} (found; choose with --device)")
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", Status.OK, f"{platform.python_implementation()} {version}")
    yield Check("system", Status.OK, f"{platform.platform()}, {platform.machine()}")
    yield _packages()
    yield disk(data_root)
    yield from _torch_checks(chosen)
    yield from _compilers(chosen)


def _packages() -> Check:
    names = ("kernels", "rdep", "model", "data", "train", "eval", "cli")
    versions = {
        name: _version(f"nmoe-{name}") or ("from source" if find_spec(f"nmoe.{name}") else None) for name in names
    }
    missing = [f"nmoe-{name}" for name, version in versions.items() if version is None]
    found = " ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return Check("nmoe", Status.BROKEN, found, f"not installed: {', '.join(missing)}; pip install nmoe-cli")
    return Check("nmoe", Status.OK, found)


def disk(data_root: Path) -> Check:
    """Whether runs can be written under `data_root`, which need not exist yet, and the space there."""
    place = data_root.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check("disk", Status.BROKEN, f"{place} takes no files", "set NMOE_DATA_PATH to a folder that does")
    free = shutil.disk_usage(place).free
    found = f"{format_bytes(free)} free for {data_root}"
    if free < _MIN_FREE_BYTES:
        return Check(
            "disk", Status.BROKEN, found, "no room for checkpoints: free some, or set NMOE_DATA_PATH elsewhere"
        )
    return Check("disk", Status.OK, found)


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, by itself or by its tool; None where there is none."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    if match:
        return match[0]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def _torch_checks(device: Device) -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", Status.BROKEN, _first_line(error), "PyTorch does not load: install it anew")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Check("torch", Status.OK, f"{torch.__version__} ({build})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("threads", Status.OK, f"{torch.get_num_threads()} of PyTorch's on {cores} cores")
    yield from gpus(device, nvidia_driver())


def gpus(device: Device, driver: str | None) -> Iterator[Check]:
    """Findings about the driver, each GPU, and access between them.

    Args:
        device: what the machine is meant for.
        driver: version of the NVIDIA driver, if there is one.
    """
    import torch

    lacking = Status.BROKEN if device == "cuda" else Status.MISSING
    if driver is None:
        yield Check("gpu", lacking, "no NVIDIA driver", 'without one, runtime.device = "cpu" is what runs')
        return
    if torch.version.cuda is None:
        yield Check("driver", Status.OK, driver)
        yield Check("gpu", lacking, "hidden: this PyTorch is built for CPU only", "install PyTorch's CUDA build")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        yield Check("driver", Status.OK, driver)
        means = "the driver is too old for this PyTorch, or the GPUs are hidden (CUDA_VISIBLE_DEVICES, container flags)"
        yield Check("gpu", lacking, "none that PyTorch can use", means)
        return
    yield Check("driver", Status.OK, driver)
    for index in range(count):
        yield _gpu(index)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blind = [f"{a}→{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if blind:
        means = "ranks on these GPUs cannot write to each other: RDEP over IPC needs peer access (NVLink, or PCIe P2P)"
        yield Check("peer access", Status.MISSING, f"none for {', '.join(blind)}", means)
    elif count > 1:
        yield Check("peer access", Status.OK, f"all {len(pairs)} pairs")


def _gpu(index: int) -> Check:
    import torch
    from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch

    properties = torch.cuda.get_device_properties(index)
    arch = detect_arch(f"cuda:{index}")
    found = f"{properties.name}, {format_bytes(properties.total_memory)}, {arch}"
    if arch in NATIVE_ARCHES:
        return Check(f"gpu {index}", Status.OK, found)
    means = f'native kernels are for {", ".join(NATIVE_ARCHES)}: use runtime.kernels = "reference"'
    return Check(f"gpu {index}", Status.OK, found, means)


def _compilers(device: Device) -> Iterator[Check]:
    for name, probe in (("triton", _triton), ("nvrtc", _nvrtc)):
        try:
            yield Check(name, Status.OK, probe())
        except Exception as error:  # any failure of a third party's import or compiler is the finding
            status = Status.BROKEN if device == "cuda" else Status.MISSING
            yield Check(name, status, _first_line(error), "native kernels need it, on a GPU")


def _triton() -> str:
    import triton

    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang), which Triton builds its launchers with")
    return f"{triton.__version__} with {compiler}"


def _nvrtc() -> str:
    from cuda.core import Program, ProgramOptions

    Program('extern "C" __global__ void probe() {}', "c++", ProgramOptions(arch=_PROBE_ARCH)).compile("cubin")
    return f"compiles for {_PROBE_ARCH} (cuda-core {_version('cuda-core')})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
