"""Times steps and derives rates."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nmoe.kernels.arch import device_limits
from nmoe.model.count import flops_per_token
from nmoe.train.schema import TrainingConfig

_POLL_S = 2e-4


class Moment:
    """When the device has done what it was told so far. A GPU notes its own time; the host need not be there."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self, check: Callable[[], None] | None = None) -> None:
        """Returns once it has come.

        Args:
            check: called from time to time while it has not, to raise what would keep it from coming.
        """
        if self._event is None:
            return
        if check is None:
            self._event.synchronize()
            return
        while not self._event.query():
            check()
            time.sleep(_POLL_S)

    def since(self, earlier: "Moment") -> float:
        """Seconds after another moment of the same device; both have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1e3


class Clock:
    """Times steps on the device, without checkpoints and evaluations, and derives rates."""

    def __init__(self, config: TrainingConfig, device: torch.device, first_step: int, shared_bytes: int) -> None:
        """`shared_bytes`: what ranks share of the device's memory, beside PyTorch's."""
        self.shared_bytes = shared_bytes
        self.device, self.tokens = device, config.tokens_per_step
        self.flops = flops_per_token(config.model, config.train.seq_len) * self.tokens
        self.peak = _peak_flops(device) * config.runtime.world_size if config.runtime.precision == "bf16" else 0.0
        self.begun, self.mark = time.perf_counter(), Moment(device)
        self.first_step, self.seconds, self.total = first_step, 0.0, 0.0

    def lap(self, ended: Moment) -> None:
        """A step has ended; it began with the lap before, or with the last `skip`."""
        self.seconds, self.mark = ended.since(self.mark), ended
        self.total += self.seconds

    def skip(self) -> None:
        """What was done since the last lap, checkpoints and evaluations, belongs to no step."""
        self.mark = Moment(self.device)

    def figures(self, step: int, steps: int) -> dict[str, Any]:
        """The fields of a `StepReport` that are about time and room."""
        mean = self.total / (step - self.first_step)
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) + self.shared_bytes if on_gpu else _resident_bytes()
        return {
            "ms": self.seconds * 1e3,
            "tokens_per_s": self.tokens / self.seconds,
            "mfu": self.flops / self.seconds / self.peak if self.peak else None,
            "elapsed_s": time.perf_counter() - self.begun,
            "eta_s": mean * (steps - step),
            "memory_bytes": memory,
        }


def _peak_flops(device: torch.device) -> float:
    """Published bf16 FLOP/s of the device; 0 where they are not known."""
    limits = device_limits(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return 0.0 if limits is None else limits.bf16_flops


def _resident_bytes() -> int | None:
    """Resident memory of this process, where the system says it in /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
