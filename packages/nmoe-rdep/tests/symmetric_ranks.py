"""One rank of test_symmetric.py. Usage: symmetric_ranks.py CASE DEVICE."""

import os
import sys
import time
from unittest.mock import patch

import pytest
import ranks
import torch
from nmoe.rdep.errors import PeerTimeoutError, SymmetricMemoryError
from nmoe.rdep.faults import PHASES, Faults

SECTION = 1 << 16
UNEVEN = 1_000_003  # bytes: no whole number of words or pages
COUNTS = 200
DISPATCH = PHASES.index("dispatch")


def memory_of(world):
    if world.device.type == "cuda":
        from nmoe.rdep.ipc import IpcMemory

        return IpcMemory(world)
    from nmoe.rdep.shm import SharedMemory

    return SharedMemory(world)


def numbers(source, owner, world):
    """What rank `source` writes to rank `owner`."""
    generator = torch.Generator().manual_seed(source * world.size + owner)
    return torch.randint(-(2**31), 2**31, (SECTION,), dtype=torch.int32, generator=generator)


def everyone_writes_to_everyone(world, memory):
    rank, size = world.rank, world.size
    first = memory.allocate(4 * SECTION * size)
    second = memory.allocate(UNEVEN)
    assert memory.allocated == 4 * SECTION * size + UNEVEN
    for buffers, nbytes in ((first, 4 * SECTION * size), (second, UNEVEN)):
        assert len(buffers) == size
        assert len({buffer.data_ptr() for buffer in buffers}) == size
        for buffer in buffers:
            assert (buffer.dtype, buffer.shape, buffer.device) == (torch.uint8, (nbytes,), world.device)
            assert buffer.data_ptr() % 256 == 0
            assert not buffer.any(), "zero at the start"
    world.barrier()
    for owner, buffer in enumerate(first):
        section = buffer.view(torch.int32).view(size, SECTION)[rank]
        section.copy_(numbers(rank, owner, world).to(world.device))
    second[(rank + 1) % size][-1] = rank + 1
    world.barrier()
    own = first[rank].view(torch.int32).view(size, SECTION).cpu()
    for source in range(size):
        assert torch.equal(own[source], numbers(source, rank, world)), "what was sent has arrived"
    assert int(second[rank][-1]) == (rank - 1) % size + 1, "the last byte too"
    assert not second[rank][:-1].any(), "and nothing beside it: the buffers are apart"
    received = sum(int(value) for value in world.share("received", str(int(own.long().sum())).encode()))
    sent = sum(int(numbers(s, o, world).long().sum()) for s in range(size) for o in range(size))
    assert received == sent
    world.barrier()


def refusals(world, memory):
    rank, size = world.rank, world.size
    sizes = [4096 + (r == size - 1) for r in range(size)]
    expect(lambda: memory.allocate(sizes[rank]), "same number of bytes", "4096 on rank 0", f"4097 on rank {size - 1}")
    expect(lambda: memory.allocate(0), "at least 1", "0 on rank 0")
    expect(lambda: memory.allocate(1 << 44), "rank 0: expected", "free", "lower train.micro_batch_size")
    if world.device.type == "cpu":
        full = OSError(28, "No space left on device")
        with patch("os.posix_fallocate", side_effect=full if rank == 1 else None, wraps=os.posix_fallocate):
            expect(lambda: memory.allocate(4096), "rank 1: expected room for 4096 bytes", "--shm-size")
    assert len(memory.allocate(4096)) == size, "a refusal on all ranks leaves all as they were"


def expect(call, *told):
    with pytest.raises(SymmetricMemoryError) as caught:
        call()
    assert all(words in str(caught.value) for words in told), str(caught.value)


def counters(world, memory):
    """Ranks in a ring: payloads under a counter that wraps, acknowledged before the next is written."""
    from nmoe.rdep.shm import post, wait

    n = 4096
    buffers = [buffer.view(torch.int32) for buffer in memory.allocate(4 * (n + 2))]
    own, after, before = (buffers[(world.rank + step) % world.size] for step in (0, 1, -1))
    start = 2**31 - COUNTS // 2
    for words in (own[n:],):
        post(words, 0, start)
        post(words, 1, start)
    world.barrier()
    for count in range(start + 1, start + COUNTS):
        deadline = time.monotonic() + 30
        assert wait(own[n:], 1, count - 1, deadline), "the next has read the last"
        after[:n] = count % 1000
        post(after[n:], 0, count)
        assert wait(own[n:], 0, count, deadline)
        assert own[:n].eq(count % 1000).all(), "the payload is there when its counter is"
        post(before[n:], 1, count)
    world.barrier()


def missing(world, memory):
    """The last rank posts nothing: the others come to their deadline, and know its number."""
    from nmoe.rdep.shm import post, wait

    rank, size = world.rank, world.size
    words = [buffer.view(torch.int32) for buffer in memory.allocate(4 * size)]
    if rank == size - 1:
        world.barrier()
        return
    for peer in words:
        post(peer, rank, 1)
    faults = Faults(world.device, timeout_s=0.5)
    deadline = time.monotonic() + 30  # of those that do come
    for source in range(size):
        until = time.monotonic() + 0.5 if source == size - 1 else deadline
        if not wait(words[rank], source, 1, until):
            faults.report_timeout(source, DISPATCH)
    with pytest.raises(PeerTimeoutError) as caught:
        faults.check()
    assert (caught.value.rank, caught.value.phase) == (size - 1, "dispatch")
    world.barrier()


def main():
    case, device = sys.argv[1:]
    world = ranks.join(device)
    memory = memory_of(world)
    if case == "killed":
        buffers = memory.allocate(UNEVEN)
        assert buffers[world.rank].numel() == UNEVEN
        print("mapped", flush=True)
        time.sleep(600)
    everyone_writes_to_everyone(world, memory)
    refusals(world, memory)
    if device == "cpu":
        counters(world, memory)
        missing(world, memory)
    memory.close()
    memory.close()
    expect(lambda: memory.allocate(4096), "found it closed")
    world.close()


if __name__ == "__main__":
    main()
