"""What the host learns of faults, and when."""

import math

import pytest
import torch
from nmoe.rdep.errors import CapacityError, PeerTimeoutError
from nmoe.rdep.faults import PHASES, Faults

CPU = torch.device("cpu")


def test_nothing_wrong() -> None:
    faults = Faults(CPU, timeout_s=3)
    faults.check()
    assert faults.healthy.dtype == torch.int32
    assert faults.healthy.shape == ()
    assert int(faults.healthy) == 1
    assert (faults.record.dtype, faults.record.tolist()) == (torch.int32, [0] * 8)


@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_a_timeout_names_rank_phase_and_time(phase: int) -> None:
    faults = Faults(CPU, timeout_s=2.5)
    faults.report_timeout(3, phase)
    assert int(faults.healthy) == 0
    with pytest.raises(PeerTimeoutError, match=rf"expected rank 3 .*'{PHASES[phase]}' within 2.5 s.*rank 3") as caught:
        faults.check()
    assert (caught.value.rank, caught.value.phase, caught.value.timeout_s) == (3, PHASES[phase], 2.5)


@pytest.mark.parametrize("even_rows", [640, 8192])
@pytest.mark.parametrize("over", [1.001, 1.4, 4.0])
def test_an_overflow_says_what_would_have_sufficed(even_rows: int, over: float) -> None:
    factor = 1.25
    capacity = math.ceil(factor * even_rows)
    needed = int(capacity * over) + 1
    faults = Faults(CPU, timeout_s=3)
    faults.even_rows = even_rows
    faults.report_overflow(needed, capacity)
    assert int(faults.healthy) == 0
    with pytest.raises(CapacityError, match=f"at most {capacity} rows.* found {needed}: .*capacity_factor") as caught:
        faults.check()
    assert (caught.value.needed, caught.value.capacity) == (needed, capacity)
    assert (caught.value.needed_factor - 0.01) * even_rows < needed <= caught.value.needed_factor * even_rows + 1e-6


def test_of_several_overflows_the_worst_is_told() -> None:
    faults = Faults(CPU, timeout_s=3)
    for needed in (9, 30, 12):
        faults.report_overflow(needed, 8)
    assert faults.found
    with pytest.raises(CapacityError, match="found 30"):
        faults.check()


def test_the_first_fault_is_told() -> None:
    faults = Faults(CPU, timeout_s=3)
    faults.report_timeout(1, 0)
    faults.report_overflow(9, 8)
    faults.report_timeout(2, 1)
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        faults.check()


@pytest.mark.gpu
def test_a_kernel_writes_the_record_where_the_host_reads_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    faults = Faults(device, timeout_s=3)
    assert faults.record.is_pinned()
    assert faults.healthy.device == device
    storage = torch._C._construct_storage_from_data_pointer(faults.record.data_ptr(), device, 32)
    on_device = torch.empty(0, dtype=torch.int32, device=device).set_(storage)
    # Kernels, and no copies: those would be told that both ends are on the device.
    on_device[1].add_(6)
    on_device[2].add_(2)
    faults.check()
    on_device[0].add_(1)
    torch.cuda.synchronize()
    with pytest.raises(PeerTimeoutError, match="rank 6 to reach 'gradient dispatch'"):
        faults.check()
