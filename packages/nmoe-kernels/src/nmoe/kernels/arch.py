"""What the GPU at hand is: its arch, and its published limits where they are known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from nmoe.kernels.errors import UnsupportedArchError

NATIVE_ARCHES = ("sm_90a", "sm_100a")
"""Arches that the native tier has kernels for. Those for `sm_100a` are compiled, and have never been run."""

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class DeviceLimits:
    """Published limits of a device: dense bf16 FLOP/s, and device memory in bytes; and its arch."""

    bf16_flops: float
    memory_bytes: int
    arch: str


# FLOP/s: vendor datasheets, dense (not sparse) bf16, SXM parts. Memory: what the driver reports.
_LIMITS = {
    "NVIDIA B200": DeviceLimits(2.25e15, 183_359 << 20, "sm_100a"),
    "NVIDIA H200": DeviceLimits(989.4e12, 143_771 << 20, "sm_90a"),
    "NVIDIA H100 80GB HBM3": DeviceLimits(989.4e12, 81_559 << 20, "sm_90a"),
    "NVIDIA A100-SXM4-80GB": DeviceLimits(312e12, 81_920 << 20, "sm_80"),
}


def device_limits(name: str) -> DeviceLimits | None:
    """Limits of the device that the driver calls `name`; None where they are not known."""
    return _LIMITS.get(name)


def known_devices() -> dict[str, DeviceLimits]:
    """Every device whose limits are known, by the driver's name for it."""
    return dict(_LIMITS)


def detect_arch(device: torch.device | str = "cuda") -> str:
    """Arch of a CUDA device as a compiler target: `sm_90a`, `sm_100a`, `sm_89`, …

    Raises:
        UnsupportedArchError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UnsupportedArchError(
            "expected a CUDA GPU, found none: run on a machine with one, or set runtime.device = 'cpu' and "
            "runtime.kernels = 'reference'"
        )
    major, minor = torch.cuda.get_device_capability(device)
    suffix = "a" if major in (9, 10, 12) else ""
    return f"sm_{major}{minor}{suffix}"


def entry_for(device: torch.device, by_arch: Mapping[str, _Entry], what: str) -> _Entry:
    """The entry of a table by arch for a CUDA device.

    Args:
        device: whose arch is looked up.
        by_arch: one entry for each arch that there is one for.
        what: has the table, for the message: "the attention kernels".

    Raises:
        UnsupportedArchError: there is no entry for the device, or no CUDA device.
    """
    arch = detect_arch(device)
    if arch not in by_arch:
        raise UnsupportedArchError(
            f"expected one of {', '.join(by_arch)} for {what}, found {arch}: set runtime.kernels = 'reference'"
        )
    return by_arch[arch]
