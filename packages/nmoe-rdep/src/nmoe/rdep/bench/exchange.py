"""The exchange alone: bytes that cross NVLink, and how fast, beside NCCL and plain copies of as many bytes.

Of one dispatch and one return of T tokens a rank, each to K of E experts drawn at random:

* bytes: of rows that leave a GPU. A token goes to a rank once, however many of its experts are there; NCCL is given
  those same rows, already sorted by owner. `logical_bytes` is what K copies of every token would be.
* dispatch: from a common start until all rows have arrived, its plan, experts, gates and flags included, in one wave.
* return: until all owners' sums of a rank's tokens have come back, which is what NCCL's way back does too.
* combine: a return, and the sum of a token's rows over owners.
* pair_graph: a dispatch and a return, one after the other in a CUDA graph; NCCL's pair likewise. indexed_pair_graph:
  with the order of the rows at the owner between, which NCCL's rows would need too.

Shapes: T tokens, D width, K slots, W ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from nmoe.kernels.native import exchange_cuda as exchange
from nmoe.kernels.native.routing_cuda import RowIndex, index_slab
from nmoe.kernels.reference.exchange import WORDS
from nmoe.rdep.bench.timing import time_graph, time_together
from nmoe.rdep.faults import Faults
from nmoe.rdep.ipc import IpcMemory
from nmoe.rdep.slabs import allocate_returns, allocate_slab, allocate_words
from nmoe.rdep.world import World

DIM, TOP_K, EXPERTS = 2048, 8, 128
_TIMEOUT_S = 30.0


def measure_exchange(world: World, n_tokens: int) -> dict[str, Any]:
    """The figures of `n_tokens` a rank: bytes, microseconds, and GB/s of the bytes that leave a GPU."""
    memory = IpcMemory(world)
    figures = _measure(world, memory, n_tokens)
    world.barrier()
    memory.close()
    return figures


def _measure(world: World, memory: IpcMemory, n_tokens: int) -> dict[str, Any]:
    rank, size, device = world.rank, world.size, world.device
    torch.manual_seed(rank)
    sizes = (n_tokens, DIM, TOP_K, torch.bfloat16)
    slab, returns = allocate_slab(memory, rank, size, *sizes), allocate_returns(memory, size, *sizes)
    faults = Faults(device, timeout_s=_TIMEOUT_S)
    words = allocate_words(memory, WORDS * size)
    link = exchange.Link(rank, words, faults.record, faults.healthy, _TIMEOUT_S, device)
    x_TD = torch.randn(n_tokens, DIM, device=device, dtype=torch.bfloat16)
    expert_TK = torch.rand(n_tokens, EXPERTS, device=device).argsort(1)[:, :TOP_K].int().contiguous()
    gate_TK, n_local = torch.rand(n_tokens, TOP_K, device=device), EXPERTS // size
    capacity = n_tokens * min(size * TOP_K, 2 * TOP_K)
    y_RD = torch.randn(capacity, DIM, device=device, dtype=torch.bfloat16)

    sent: list[exchange.Plan] = []

    def dispatch() -> None:
        sent.append(exchange.make_plan(link, expert_TK))
        exchange.dispatch_tokens(link, slab, x_TD, gate_TK, sent[-1], n_local, n_waves=1)
        exchange.await_rows(link, gradients=False)

    def order() -> RowIndex:
        expert_SK, count_1W = slab.expert_WNK[rank].flatten(0, 1), slab.end_CW[rank][-1:]
        return index_slab(expert_SK, count_1W, n_local, capacity, healthy=faults.healthy, record=faults.record)[0]

    def return_() -> None:
        exchange.return_rows(link, returns, y_RD, index.row_TK, slab.count_W[rank])
        exchange.await_returns(link, gradients=False)

    def collect() -> None:
        exchange.collect_rows(link, returns, sent.pop(), DIM)

    def combine() -> None:
        exchange.return_rows(link, returns, y_RD, index.row_TK, slab.count_W[rank])
        collect()

    def end() -> None:
        """What was begun and not timed."""
        if sent:
            combine()

    def begin() -> None:
        end()
        dispatch()

    def begin_after_return() -> None:
        if sent:
            collect()
        dispatch()

    def pair() -> None:
        dispatch()
        combine()

    def indexed_pair() -> None:
        dispatch()
        order()
        combine()

    dispatch()
    index = order()  # the same each time, as the routing is
    dispatch_ms = time_together(world, dispatch, end)
    end()
    return_ms = time_together(world, return_, begin_after_return)
    collect()
    combine_ms = time_together(world, combine, begin)
    pair_ms, indexed_pair_ms = time_graph(world, pair, 10), time_graph(world, indexed_pair, 10)
    faults.check()

    owner_TK = expert_TK // n_local
    count_W = [int((owner_TK == owner).any(1).sum()) for owner in range(size)]
    crossing = (sum(count_W) - count_W[rank]) * DIM * 2
    nccl_ms, nccl_pair_ms = _nccl(world, count_W)
    copy_ms = _copies(world, memory, crossing)
    bytes_most = _most(world, crossing)
    figures = {
        "tokens": n_tokens,
        "dim": DIM,
        "top_k": TOP_K,
        "experts": EXPERTS,
        "crossing_bytes": bytes_most,
        "local_bytes": count_W[rank] * DIM * 2,
        "logical_bytes": n_tokens * TOP_K * DIM * 2,
        "dispatch_us": dispatch_ms * 1e3,
        "return_us": return_ms * 1e3,
        "combine_us": combine_ms * 1e3,
        "nccl_us": nccl_ms * 1e3,
        "copy_engines_us": copy_ms * 1e3,
        "pair_graph_us": pair_ms * 1e3,
        "indexed_pair_graph_us": indexed_pair_ms * 1e3,
        "nccl_pair_graph_us": nccl_pair_ms * 1e3,
    }
    for name in ("dispatch", "return", "combine", "nccl", "copy_engines"):
        figures[f"{name}_gb_s"] = bytes_most / figures[f"{name}_us"] / 1e3
    return figures


def _nccl(world: World, count_W: list[int]) -> tuple[float, float]:
    """Milliseconds of an all-to-all of the rows that go to other ranks, and of one there and one back in a graph."""
    counts = [int.from_bytes(value[8 * world.rank : 8 * world.rank + 8], "little") for value in _share(world, count_W)]
    out_splits = [0 if rank == world.rank else count for rank, count in enumerate(counts)]
    in_splits = [0 if rank == world.rank else count for rank, count in enumerate(count_W)]
    rows = torch.randn(sum(in_splits), DIM, device=world.device, dtype=torch.bfloat16)
    landed = torch.empty(sum(out_splits), DIM, device=world.device, dtype=torch.bfloat16)

    def there() -> None:
        dist.all_to_all_single(landed, rows, out_splits, in_splits)

    def pair() -> None:
        there()
        dist.all_to_all_single(rows, landed, in_splits, out_splits)

    return time_together(world, there), time_graph(world, pair, 10)


_shared = iter(range(1 << 30))


def _share(world: World, count_W: list[int]) -> list[bytes]:
    return world.share(f"bench/{next(_shared)}", b"".join(count.to_bytes(8, "little") for count in count_W))


def _copies(world: World, memory: IpcMemory, nbytes: int) -> float:
    """Milliseconds of the copy engines, one stream a peer, for as many bytes to all peers together."""
    size = max(256, _most(world, nbytes) // (world.size - 1))
    buffers = memory.allocate(size * (world.size - 1))
    own = torch.zeros(size, dtype=torch.uint8, device=world.device)
    streams = [torch.cuda.Stream() for _ in range(world.size - 1)]

    def run() -> None:
        current = torch.cuda.current_stream()
        for number, stream in enumerate(streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                peer = (world.rank + 1 + number) % world.size
                buffers[peer][number * size : number * size + size].copy_(own, non_blocking=True)
            current.wait_stream(stream)

    return time_together(world, run)


def _most(world: World, number: int) -> int:
    least = torch.tensor(-number, device=world.device)
    world.min_(least)
    return -int(least)
