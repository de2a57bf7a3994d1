"""The exchange between GPUs, with all ranks on one GPU (`-m gpu`): each writes to the others' memory as it would over
NVLink, one after the other, and every place and sum is compared with the reference."""

from dataclasses import dataclass

import pytest
import torch
from nmoe.kernels.reference import exchange as reference
from nmoe.kernels.reference.exchange import Plan, Returns, Slab

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native import exchange_cuda as exchange
from nmoe.kernels.native.routing_cuda import RowIndex, index_slab

# W, T of each rank (in turn), N, D, K, experts: few and many ranks, ranks without tokens, rows of one piece and of
# many, one expert a token and as many as there are, more tokens than all warps take at once.
SHAPES = [
    (2, (5, 3), 5, 8, 1, 2),
    (2, (300, 0), 300, 64, 4, 6),
    (3, (33, 40, 7), 64, 776, 3, 9),
    (4, (700, 701, 650, 1), 701, 2048, 8, 32),
    (4, (3000, 2500, 3000, 2999), 3000, 768, 7, 64),
    (8, (50, 60, 70, 80, 90, 100, 0, 1), 128, 136, 8, 8),
    (2, (64, 64), 64, 16384, 2, 4),
]


@dataclass
class Ranks:
    """W ranks on one GPU."""

    links: list[exchange.Link]
    slabs: list[Slab]
    gradients: list[Slab]
    returns: list[Returns]
    record: torch.Tensor
    healthy: torch.Tensor

    @property
    def size(self) -> int:
        return len(self.links)


def make_ranks(world: int, most: int, width: int, top_k: int, timeout_s: float = 5.0) -> Ranks:
    def by_rank(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(world))

    def slabs() -> list[Slab]:
        x = by_rank(world, most, width, dtype=torch.bfloat16)
        expert = by_rank(world, most, top_k, dtype=torch.int32)
        gate = by_rank(world, most, top_k, dtype=torch.float32)
        count = by_rank(world, dtype=torch.int32)
        return [Slab(x, expert, gate, count, used) for used in by_rank(1, dtype=torch.int32)]

    words = by_rank(exchange.WORDS * world, dtype=torch.int32)
    record = torch.zeros(8, dtype=torch.int32).pin_memory()
    healthy = torch.ones((), dtype=torch.int32, device="cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    y = by_rank(world, most, width, dtype=torch.bfloat16)
    dgate = by_rank(world, most, top_k, dtype=torch.float32)
    return Ranks(
        [exchange.Link(rank, words, record, healthy, timeout_s, device) for rank in range(world)],
        slabs(),
        slabs(),
        [Returns(y, dgate)] * world,
        record,
        healthy,
    )


def draw(
    world: int, tokens: tuple[int, ...], width: int, top_k: int, n_experts: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    x = [(torch.randn(n, width) * 10.0 ** torch.randint(-2, 3, (n, 1))).bfloat16() for n in tokens]
    expert = [torch.rand(n, n_experts).argsort(1)[:, :top_k].int().contiguous() for n in tokens]
    gate = [torch.rand(n, top_k) for n in tokens]
    return x, expert, gate


def dispatch(ranks: Ranks, x: list, expert: list, gate: list, n_local: int) -> tuple[list[Plan], list[RowIndex]]:
    plans = [exchange.make_plan(link, expert_TK.cuda()) for link, expert_TK in zip(ranks.links, expert, strict=True)]
    for rank, link in enumerate(ranks.links):
        exchange.dispatch_tokens(link, ranks.slabs[rank], x[rank].cuda(), gate[rank].cuda(), plans[rank], n_local)
    indices = []
    for rank, link in enumerate(ranks.links):
        exchange.await_rows(link, gradients=False)
        slab = ranks.slabs[rank]
        expert_WNK = slab.expert_WNK[rank]
        capacity = expert_WNK.numel()
        indices.append(
            index_slab(
                expert_WNK.flatten(0, 1),
                slab.count_W[rank],
                n_local,
                capacity,
                healthy=ranks.healthy,
                record=ranks.record,
            )
        )
    return plans, indices


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "tokens", "most", "width", "top_k", "n_experts"), SHAPES)
def test_every_row_and_sum_is_the_references(
    gpu: str, world: int, tokens: tuple[int, ...], most: int, width: int, top_k: int, n_experts: int
) -> None:
    n_local = n_experts // world
    ranks = make_ranks(world, most, width, top_k)
    x, expert, gate = draw(world, tokens, width, top_k, n_experts)
    dout, _, _ = draw(world, tokens, width, top_k, n_experts)
    plans, indices = dispatch(ranks, x, expert, gate, n_local)
    wanted = [reference.plan_dispatch(expert_TK, n_local, world) for expert_TK in expert]
    for plan, want in zip(plans, wanted, strict=True):
        assert torch.equal(plan.ordinal_TW.cpu(), want.ordinal_TW)

    for owner in range(world):
        slab = ranks.slabs[owner]
        for source in range(world):
            ordinal_T = wanted[source].ordinal_TW[:, owner]
            sent = ordinal_T >= 0
            n = int(sent.sum())
            assert int(slab.count_W[owner][source]) == n
            assert torch.equal(slab.x_WND[owner][source, :n].cpu(), x[source][sent])
            local = reference.local_experts(expert[source], owner, n_local)
            assert torch.equal(slab.expert_WNK[owner][source, :n].cpu(), local[sent])
            assert torch.equal(slab.gate_WNK[owner][source, :n].cpu(), gate[source][sent])
        expert_SK, count_W = slab.expert_WNK[owner].flatten(0, 1).cpu(), slab.count_W[owner].cpu()
        want_index = reference.index_slab(expert_SK, count_W, n_local)
        n_rows = int(want_index.offset_E[-1])
        index = indices[owner]
        assert torch.equal(index.offset_E.cpu(), want_index.offset_E)
        assert torch.equal(index.order_R[:n_rows].cpu().long(), want_index.order_R)
        assert torch.equal(index.token_R[:n_rows].cpu().long(), want_index.order_R // top_k)
        assert torch.equal(index.row_TK.cpu().long(), want_index.row_TK)

    # Rows as experts could give them, and their sums on the way back.
    y = [(torch.randn(index.order_R.shape[0], width) * 10.0).bfloat16() for index in indices]
    for rank, link in enumerate(ranks.links):
        index, count_W = indices[rank], ranks.slabs[rank].count_W[rank]
        exchange.return_rows(link, ranks.returns[rank], y[rank].cuda(), index.row_TK, count_W)
    out = [
        exchange.collect_rows(link, ranks.returns[rank], plans[rank], width) for rank, link in enumerate(ranks.links)
    ]
    sums = [reference.sum_slots(y[rank], indices[rank].row_TK.cpu().long()) for rank in range(world)]
    for source in range(world):
        returned = torch.stack([of_owner.view(world, most, width)[source] for of_owner in sums])
        assert torch.equal(out[source].cpu(), reference.sum_owners(returned, wanted[source]))

    # The gradients' way.
    for rank, link in enumerate(ranks.links):
        exchange.dispatch_gradients(link, ranks.gradients[rank], ranks.slabs[rank], dout[rank].cuda(), plans[rank])
    for rank, link in enumerate(ranks.links):
        exchange.await_rows(link, gradients=True)
        for source in range(world):
            sent = wanted[source].ordinal_TW[:, rank] >= 0
            landed = ranks.gradients[rank].x_WND[rank][source, : int(sent.sum())]
            assert torch.equal(landed.cpu(), dout[source][sent])
    partial = [torch.randn(3, index.order_R.shape[0]) for index in indices]
    for rank, link in enumerate(ranks.links):
        index, count_W = indices[rank], ranks.slabs[rank].count_W[rank]
        exchange.return_rows(link, ranks.returns[rank], y[rank].cuda(), index.row_TK, count_W, partial[rank].cuda())
    for source, link in enumerate(ranks.links):
        dx, dgate = exchange.collect_gradients(link, ranks.returns[source], plans[source], width, n_local)
        assert torch.equal(dx, out[source])
        owner_TK, ordinal_TW = expert[source].long() // n_local, wanted[source].ordinal_TW.long()
        for t in range(0, tokens[source], max(1, tokens[source] // 50)):
            for k in range(top_k):
                owner = int(owner_TK[t, k])
                row = int(indices[owner].row_TK[source * most + int(ordinal_TW[t, owner]), k])
                want = (partial[owner][0, row] + partial[owner][1, row]) + partial[owner][2, row]
                assert dgate[t, k].item() == want.item()
    assert int(ranks.healthy) == 1
    assert ranks.record.tolist() == [0] * 8


@pytest.mark.gpu
def test_exchanges_follow_each_other_in_a_graph(gpu: str) -> None:
    """Replayed, with other tokens each time: flags and counters go on by themselves, and a slab is used again."""
    world, most, width, top_k, n_experts = 2, 200, 64, 2, 8
    ranks = make_ranks(world, most, width, top_k)
    x, expert, gate = ([t.cuda() for t in part] for part in draw(world, (200, 150), width, top_k, n_experts))

    def step() -> list[torch.Tensor]:
        plans, indices = dispatch(ranks, x, expert, gate, n_experts // world)
        for rank, link in enumerate(ranks.links):
            index, slab = indices[rank], ranks.slabs[rank]
            y_RD = slab.x_WND[rank].flatten(0, 1)[index.token_R.clamp(0, world * most - 1)]
            exchange.return_rows(link, ranks.returns[rank], y_RD, index.row_TK, slab.count_W[rank])
        return [
            exchange.collect_rows(link, ranks.returns[rank], plans[rank], width)
            for rank, link in enumerate(ranks.links)
        ]

    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(5):
        for x_TD, expert_TK in zip(x, expert, strict=True):
            x_TD.copy_(torch.randn(x_TD.shape))
            expert_TK.copy_(torch.rand(expert_TK.shape[0], n_experts).argsort(1)[:, :top_k])
        graph.replay()
        for out_TD, x_TD in zip(out, x, strict=True):
            torch.testing.assert_close(out_TD.float(), top_k * x_TD.float(), rtol=1e-2, atol=1e-2)
    assert ranks.record.tolist() == [0] * 8


@pytest.mark.gpu
def test_too_many_rows_are_told_and_none_is_ordered(gpu: str) -> None:
    ranks = make_ranks(2, 100, 64, 2)
    x, _, gate = draw(2, (100, 100), 64, 2, 4)
    expert = [torch.tensor([[0, 1]], dtype=torch.int32).repeat(100, 1)] * 2  # all to rank 0
    dispatch(ranks, x, expert, gate, 2)
    slab = ranks.slabs[0]
    arguments = (slab.expert_WNK[0].flatten(0, 1), slab.count_W[0], 2)
    index = index_slab(*arguments, 399, healthy=ranks.healthy, record=ranks.record)
    torch.cuda.synchronize()
    assert int(ranks.healthy) == 0
    assert ranks.record.tolist()[:5] == [2, 0, 0, 400, 399]
    assert index.offset_E.tolist() == [0, 0, 0]
    assert bool((index.row_TK == -1).all())
    assert int(index.schedule[0]) == 0
    exact = index_slab(*arguments, 400, healthy=ranks.healthy, record=ranks.record)
    assert exact.offset_E.tolist() == [0, 200, 400]


@pytest.mark.gpu
def test_a_missing_rank_is_named_and_nothing_hangs(gpu: str) -> None:
    ranks = make_ranks(2, 10, 64, 2, timeout_s=0.3)
    x, expert, gate = draw(2, (10, 10), 64, 2, 4)
    plan = exchange.make_plan(ranks.links[0], expert[0].cuda())
    exchange.dispatch_tokens(ranks.links[0], ranks.slabs[0], x[0].cuda(), gate[0].cuda(), plan, 2)
    exchange.await_rows(ranks.links[0], gradients=False)  # rank 1 sends nothing
    torch.cuda.synchronize()
    assert ranks.record.tolist()[:3] == [1, 1, 0]
    assert int(ranks.healthy) == 0


@pytest.mark.gpu
def test_the_tail_is_cleared_and_no_more(gpu: str) -> None:
    for end, n_rows in ((0, 10), (7, 100), (90, 100), (100, 100)):
        a, b = (torch.full((n_rows, width), torch.nan, dtype=torch.bfloat16, device=gpu) for width in (24, 520))
        offset_E = torch.tensor([0, end], dtype=torch.int32, device=gpu)
        exchange.clear_tail(a, b, offset_E)
        for tensor in (a, b):
            assert bool(torch.isnan(tensor[:end]).all())
            assert bool((tensor[end : end + 64] == 0).all())
            assert bool(torch.isnan(tensor[end + 64 :]).all())


def test_refusals() -> None:
    words = [torch.zeros(3, dtype=torch.int32)]
    with pytest.raises(ShapeError, match=r"expected 2 to 8 ranks.*found 1"):
        exchange.Link(0, words, words[0], words[0], 1.0, torch.device("cpu"))
