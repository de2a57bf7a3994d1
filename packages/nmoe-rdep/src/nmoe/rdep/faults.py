"""What went wrong on this rank while nobody on the host was waiting: kernels write it, the host reads it later."""

import math

import torch
from nmoe.rdep.errors import CapacityError, PeerTimeoutError

PHASES = ("dispatch", "return", "gradient dispatch", "gradient return", "consumed")

_NONE, _TIMEOUT, _OVERFLOW = range(3)


class Faults:
    """This rank's first fault. Reading it never waits for the device.

    Args:
        device: where the run's kernels are.
        timeout_s: the deadline of every wait, in seconds.

    Attributes:
        record: int32 (8,): code (0 none, 1 timeout, 2 overflow), missing rank, phase (index of `PHASES`), rows needed,
            rows there were (of a timeout on a GPU, the word that was waited for and the one that was there); three are
            free. The code is written last. On a GPU in pinned memory, which kernels write at the same address.
        healthy: int32 () on `device`: 1 until there is a fault, then 0.
        even_rows: of a rank where routing is even: what a capacity factor of 1 stands for. Whoever has buffers sets it.
    """

    def __init__(self, device: torch.device, *, timeout_s: float) -> None:
        self.record = torch.zeros(8, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.healthy = torch.ones((), dtype=torch.int32, device=device)
        self.even_rows = 1
        self._timeout_s = timeout_s

    def report_timeout(self, rank: int, phase: int) -> None:
        """On the CPU: `rank` did not come to `PHASES[phase]`. Changes nothing if there is a fault already."""
        self._report(_TIMEOUT, rank, phase, 0, 0)

    def report_overflow(self, needed: int, capacity: int) -> None:
        """On the CPU: `needed` rows came where `capacity` fit. Of several such faults the worst is told."""
        if int(self.record[0]) == _OVERFLOW and int(self.record[3]) < needed:
            self.record[0] = _NONE
        self._report(_OVERFLOW, 0, 0, needed, capacity)

    @property
    def found(self) -> bool:
        """Whether there is one."""
        return int(self.record[0]) != _NONE

    def check(self) -> None:
        """Does nothing while all is well.

        Raises:
            PeerTimeoutError: a rank did not come in time.
            CapacityError: more rows came to this rank than there was room for.
        """
        if not self.found:
            return
        code, rank, phase, needed, capacity = self.record[:5].tolist()
        if code == _TIMEOUT:
            raise PeerTimeoutError(rank, PHASES[phase], self._timeout_s)
        raise CapacityError(needed, capacity, math.ceil(100 * needed / self.even_rows) / 100)

    def _report(self, code: int, *found: int) -> None:
        self.healthy.zero_()
        if not self.found:
            self.record[1:5] = torch.tensor(found, dtype=torch.int32)
            self.record[0] = code
