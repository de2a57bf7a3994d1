"""One rank of test_world.py. Usage: world_ranks.py CASE DEVICE."""

import hashlib
import os
import sys
import time

import pytest
import ranks
import torch
from nmoe.rdep.errors import PeerTimeoutError, WorldError

PIECE = 1003  # odd: no rank's piece begins where a vector register does


def draw(world, n, dtype, salt=0):
    """Every rank's tensor, on every rank: sums of magnitudes as far apart as these depend on their order."""
    generator = torch.Generator().manual_seed(salt)
    whole = torch.randn(world.size, n, generator=generator) * torch.logspace(-3, 3, n)
    return whole.to(dtype)


def in_order(all_W):
    total = all_W[0].clone()
    for other in all_W[1:]:
        total += other
    return total


def close_to(found, all_W):
    """Within what W - 1 roundings of sums no larger than the magnitudes' may make."""
    bound = all_W.double().abs().sum(0) * (len(all_W) * torch.finfo(all_W.dtype).eps)
    return bool(((found.cpu().double() - all_W.double().sum(0)).abs() <= bound).all())


def collectives(world, on_gpu):
    rank, size, device = world.rank, world.size, world.device
    for dtype in (torch.float32, torch.bfloat16):
        all_W = draw(world, size * PIECE, dtype)
        exact = in_order(all_W)
        if size > 2:
            assert not torch.equal(exact, in_order(all_W.flip(0))), "the draw must tell one order from another"
        own = all_W[rank].to(device)

        summed = own.clone().view(size, PIECE)
        world.sum_(summed)
        whole, piece = own.clone(), torch.empty(PIECE, dtype=dtype, device=device)
        world.scatter_sum(whole, piece)
        assert torch.equal(whole, own), "what is given is not changed"
        within = own.clone()
        world.scatter_sum(within, within.view(size, -1)[rank])
        mine = slice(rank * PIECE, (rank + 1) * PIECE)
        assert torch.equal(within[mine], piece), "in place and not: the same bits"
        again = torch.empty_like(piece)
        world.scatter_sum(whole, again)
        assert torch.equal(again, piece), "the same bits again"
        if on_gpu:
            assert close_to(summed.flatten(), all_W)
            assert close_to(piece, all_W[:, mine])
        else:
            assert torch.equal(summed.flatten(), exact)
            assert torch.equal(piece, exact[mine])
        digests = world.share("digest", hashlib.sha256(summed.cpu().view(torch.uint8).numpy().tobytes()).digest())
        assert len(set(digests)) == 1, "the same bits on every rank"

        gathered = torch.full((size, PIECE), -1.0, dtype=dtype, device=device)
        gathered[rank] = own[mine]
        world.gather_(gathered)
        expected = torch.cat([all_W[r, r * PIECE : (r + 1) * PIECE] for r in range(size)])
        assert torch.equal(gathered.flatten().cpu(), expected)

    for dtype in (torch.int32, torch.float32):
        least = draw(world, PIECE, torch.float32).to(dtype)
        own = least[rank].to(device)
        world.min_(own)
        assert torch.equal(own.cpu(), least.min(0).values)
    figure = torch.tensor(rank + 1, dtype=torch.int32, device=device)
    world.sum_(figure)
    assert int(figure) == size * (size + 1) // 2, "a scalar"

    for call in (
        lambda: world.scatter_sum(torch.zeros(size * 3, device=device), torch.zeros(4, device=device)),
        lambda: world.scatter_sum(torch.zeros(size, device=device), torch.zeros(1, dtype=torch.int32, device=device)),
        lambda: world.gather_(torch.zeros(size + 1, device=device)),
        lambda: world.sum_(torch.zeros(2, 3, device=device).T),
    ):
        with pytest.raises(WorldError, match=r"expected .* found .*: pa(d|ss)"):
            call()

    values = [bytes(range(256)) * r for r in range(size)]
    assert world.share("value", values[rank]) == values
    assert world.share("value", values[-1 - rank]) == values[::-1], "the second call meets the others' second"

    time.sleep(0.2 * rank)
    came = time.monotonic()
    world.barrier()
    left = time.monotonic()
    came_W = [float(value) for value in world.share("came", repr(came).encode())]
    assert max(came_W) <= left, "nobody leaves before all are there"


def in_a_graph(world):
    """All collectives of a step, captured once and replayed on other numbers."""
    size, rank = world.size, world.rank
    draws = [draw(world, size * PIECE, torch.float32, salt)[rank].cuda() for salt in range(3)]
    whole = draws[0].clone()
    piece, figures = torch.empty(PIECE, device="cuda"), torch.empty(5, device="cuda")
    least = torch.empty(5, device="cuda")
    gathered = torch.empty(size, PIECE, device="cuda")

    def step():
        world.scatter_sum(whole, piece)
        gathered[rank] = piece * 2
        world.gather_(gathered)
        figures.copy_(whole[:5])
        least.copy_(whole[:5])
        world.sum_(figures)
        world.min_(least)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    for numbers in draws:
        whole.copy_(numbers)
        step()
        eager = [tensor.clone() for tensor in (piece, gathered, figures, least)]
        for tensor in (piece, gathered, figures, least):
            tensor.fill_(-1)
        graph.replay()
        for found, expected in zip((piece, gathered, figures, least), eager, strict=True):
            assert torch.equal(found, expected), "replayed and not: the same bits"
    torch.cuda.synchronize()


def missing(world):
    """The last rank does not share; the others learn which it is."""
    if world.rank == world.size - 1:
        time.sleep(1.5)
        return
    started = time.monotonic()
    with pytest.raises(PeerTimeoutError, match=f"rank {world.size - 1} to reach 'never' within 0.5 s") as caught:
        world.share("never", b"", timeout_s=0.5)
    assert (caught.value.rank, caught.value.phase) == (world.size - 1, "never")
    assert 0.4 < time.monotonic() - started < 10


def main():
    case, device = sys.argv[1:]
    rank = int(os.environ["RANK"])
    if case == "absent" and rank == 1:
        return
    if case == "absent":
        with pytest.raises(PeerTimeoutError) as caught:
            ranks.join(device, timeout_s=1.0)
        assert (caught.value.rank, caught.value.phase) == (1, "join")
        return
    world = ranks.join(device)
    assert (world.rank, world.size) == (rank, int(os.environ["WORLD_SIZE"]))
    if case == "collectives":
        collectives(world, device == "cuda")
        if device == "cuda":
            in_a_graph(world)
        missing(world)
        world.close()
        world.close()
        return
    # A rank dies without a word: `lost` is its number.
    lost = int(case.removeprefix("lost"))
    if rank == lost:
        world.store.wait(["the other is here"])
        os._exit(0)
    world.store.set("the other is here", "")
    meet = (lambda: world.share("too late", b"")) if lost == 0 else (lambda: world.sum_(torch.ones(3)))
    with pytest.raises(WorldError, match=r"(?s)expected .* found .*: see what"):
        meet()
    print("told")
    world.close()


if __name__ == "__main__":
    main()
