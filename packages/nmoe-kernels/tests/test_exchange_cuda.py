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
from nmoe.kernels.native import grouped_gemm_cuda as gemm
from nmoe.kernels.native.routing_cuda import SCHEDULE_HEAD, RowIndex, Waves, index_slab

# W, T of each rank (in turn), N, D, K, experts: few and many ranks, ranks without tokens, rows of one piece and of
# many, one expert a token and as many as there are, more tokens than all warps take at once. Beyond 1024 tokens they
# travel in waves here, of which some are empty where a rank has few.
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
        end = by_rank(reference.WAVES, world, dtype=torch.int32)
        return [Slab(x, expert, gate, end, used) for used in by_rank(1, dtype=torch.int32)]

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


def waves_of(most: int) -> int:
    return reference.WAVES if most > 1024 else 1


def dispatch(
    ranks: Ranks, x: list, expert: list, gate: list, n_local: int
) -> tuple[list[Plan], list[RowIndex], list[Waves]]:
    plans = [exchange.make_plan(link, expert_TK.cuda()) for link, expert_TK in zip(ranks.links, expert, strict=True)]
    n_waves = waves_of(ranks.slabs[0].x_WND[0].shape[1])
    for rank, link in enumerate(ranks.links):
        exchange.dispatch_tokens(
            link, ranks.slabs[rank], x[rank].cuda(), gate[rank].cuda(), plans[rank], n_local, n_waves=n_waves
        )
    indices = []
    for rank, link in enumerate(ranks.links):
        slab = ranks.slabs[rank]
        expert_WNK = slab.expert_WNK[rank]
        if n_waves > 1:
            exchange.await_choices(link)
        exchange.await_rows(link, gradients=False)
        capacity = expert_WNK.numel()
        indices.append(
            index_slab(
                expert_WNK.flatten(0, 1),
                slab.end_CW[rank][-n_waves:],
                n_local,
                capacity,
                healthy=ranks.healthy,
                record=ranks.record,
            )
        )
    return plans, [index for index, _ in indices], [waves for _, waves in indices]


def send_back(ranks: Ranks, y: list, indices: list[RowIndex], waves: list[Waves]) -> None:
    """Each rank in turn, each wave by itself."""
    for rank, link in enumerate(ranks.links):
        slab, returns, row_SK = ranks.slabs[rank], ranks.returns[rank], indices[rank].row_TK
        n_waves = waves[rank].entry_C.shape[0] - 1
        if n_waves == 1:
            exchange.return_rows(link, returns, y[rank].cuda(), row_SK, slab.count_W[rank])
        for wave in range(n_waves if n_waves > 1 else 0):
            end_CW, ready_S = slab.end_CW[rank], waves[rank].ready_S
            exchange.return_wave(link, returns, y[rank].cuda(), row_SK, end_CW, ready_S, wave)


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "tokens", "most", "width", "top_k", "n_experts"), SHAPES)
def test_every_row_and_sum_is_the_references(
    gpu: str, world: int, tokens: tuple[int, ...], most: int, width: int, top_k: int, n_experts: int
) -> None:
    n_local = n_experts // world
    ranks = make_ranks(world, most, width, top_k)
    x, expert, gate = draw(world, tokens, width, top_k, n_experts)
    dout, _, _ = draw(world, tokens, width, top_k, n_experts)
    plans, indices, waves = dispatch(ranks, x, expert, gate, n_local)
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
            ends = [int(sent[: tokens[source] * (c + 1) // reference.WAVES].sum()) for c in range(reference.WAVES)]
            assert slab.end_CW[owner][:, source].tolist() == ends
            assert torch.equal(slab.x_WND[owner][source, :n].cpu(), x[source][sent])
            local = reference.local_experts(expert[source], owner, n_local)
            assert torch.equal(slab.expert_WNK[owner][source, :n].cpu(), local[sent])
            assert torch.equal(slab.gate_WNK[owner][source, :n].cpu(), gate[source][sent])
        end_CW = slab.end_CW[owner][-waves_of(most) :].cpu()
        want_index = reference.index_slab(slab.expert_WNK[owner].flatten(0, 1).cpu(), end_CW, n_local)
        n_rows = int(want_index.offset_E[-1])
        index = indices[owner]
        assert torch.equal(index.offset_E.cpu(), want_index.offset_E)
        assert torch.equal(index.order_R[:n_rows].cpu().long(), want_index.order_R)
        assert torch.equal(index.token_R[:n_rows].cpu().long(), want_index.order_R // top_k)
        assert torch.equal(index.row_TK.cpu().long(), want_index.row_TK)
        check_waves(index, waves[owner], end_CW, n_rows)

    # Rows as experts could give them, and their sums on the way back.
    y = [(torch.randn(index.order_R.shape[0], width) * 10.0).bfloat16() for index in indices]
    send_back(ranks, y, indices, waves)
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


def check_waves(index: RowIndex, waves: Waves, end_CW: torch.Tensor, n_rows: int) -> None:
    """Every row is in one block of the schedule; a block's rows come with its wave or before, one of them with it; and
    a slab row is ready with the last of its rows' blocks."""
    world = end_CW.shape[1]
    most, entry_C = index.row_TK.shape[0] // world, waves.entry_C.tolist()
    assert entry_C[0] == 0
    blocks, by_expert = (
        schedule[SCHEDULE_HEAD : SCHEDULE_HEAD + 4 * entry_C[-1]].view(-1, 4).tolist()
        for schedule in (waves.schedule, index.schedule)
    )
    assert by_expert == sorted(blocks, key=lambda block: block[:2])
    assert blocks == sorted(blocks, key=lambda block: (block[3], *block[:2]))
    assert waves.schedule[:SCHEDULE_HEAD].tolist() == index.schedule[:SCHEDULE_HEAD].tolist() == [entry_C[-1], *[0] * 7]
    token_R = index.token_R[:n_rows].cpu().long()
    wave_R = (token_R % most >= end_CW[:, token_R // most]).sum(0)
    block_wave_R = torch.full((n_rows,), -1)
    offsets = index.offset_E.tolist()
    for number, (expert, first, rows, wave) in enumerate(blocks):
        assert entry_C[wave] <= number < entry_C[wave + 1]
        assert offsets[expert] <= first
        assert first + rows <= offsets[expert + 1]
        assert bool((block_wave_R[first : first + rows] == -1).all())
        block_wave_R[first : first + rows] = wave
        assert int(wave_R[first : first + rows].max()) <= wave
        ends_expert = first + rows == offsets[expert + 1]
        assert ends_expert or int(wave_R[first + rows - 1]) == wave
    assert bool((block_wave_R >= 0).all())
    ready_S = torch.zeros(index.row_TK.shape[0], dtype=torch.long).scatter_reduce(0, token_R, block_wave_R, "amax")
    there = token_R.unique()
    assert torch.equal(waves.ready_S.cpu().long()[there], ready_S[there])


@pytest.mark.gpu
def test_products_of_waves_are_the_products(gpu: str) -> None:
    """Bit for bit: a tile does not know when it was computed."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the grouped products are for sm_90a")
    world, most, width, hidden, top_k, n_experts = 2, 3000, 128, 192, 4, 12
    ranks = make_ranks(world, most, width, top_k)
    x, expert, gate = draw(world, (3000, 1700), width, top_k, n_experts)
    _, indices, waves = dispatch(ranks, x, expert, gate, n_experts // world)
    w13 = torch.randn(n_experts // world, 2, hidden, width, device=gpu).bfloat16() * 0.1
    w2 = torch.randn(n_experts // world, width, hidden, device=gpu).bfloat16() * 0.1
    for rank, link in enumerate(ranks.links):
        slab, index = ranks.slabs[rank], indices[rank]
        n_rows = int(index.offset_E[-1])
        x_SD, gate_SK = slab.x_WND[rank].flatten(0, 1), slab.gate_WNK[rank].flatten(0, 1)
        for keep in (False, True):
            wanted, wanted_pre = gemm.up(x_SD, index, w13, keep_pre=keep)
            found, found_pre = gemm.up(x_SD, index, w13, keep_pre=keep, arriving=(link, waves[rank]))
            assert torch.equal(found[:n_rows], wanted[:n_rows])
            assert torch.equal(found_pre[:n_rows], wanted_pre[:n_rows])
        wanted_y = gemm.down(wanted, index, gate_SK, w2)
        y_RD = torch.full_like(wanted_y, torch.nan)
        for wave in range(reference.WAVES):
            gemm.down_wave(wanted, index, gate_SK, w2, y_RD, waves=waves[rank], wave=wave)
            done = index.token_R[:n_rows][~y_RD[:n_rows].isnan().any(1)].long()
            ready = (waves[rank].ready_S <= wave).nonzero()[:, 0]
            rows = index.row_TK[ready][index.row_TK[ready] >= 0].long()
            assert not bool(y_RD[rows].isnan().any()), "what is ready has been computed"
            assert done.numel() >= rows.numel()
        assert torch.equal(y_RD[:n_rows], wanted_y[:n_rows])


@pytest.mark.gpu
def test_exchanges_follow_each_other_in_a_graph(gpu: str) -> None:
    """Replayed, with other tokens each time: flags and counters go on by themselves, and a slab is used again."""
    world, most, width, top_k, n_experts = 2, 200, 64, 2, 8
    ranks = make_ranks(world, most, width, top_k)
    x, expert, gate = ([t.cuda() for t in part] for part in draw(world, (200, 150), width, top_k, n_experts))

    def step() -> list[torch.Tensor]:
        plans, indices, _ = dispatch(ranks, x, expert, gate, n_experts // world)
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
    arguments = (slab.expert_WNK[0].flatten(0, 1), slab.end_CW[0][-1:], 2)
    index, _ = index_slab(*arguments, 399, healthy=ranks.healthy, record=ranks.record)
    torch.cuda.synchronize()
    assert int(ranks.healthy) == 0
    assert ranks.record.tolist()[:5] == [2, 0, 0, 400, 399]
    assert index.offset_E.tolist() == [0, 0, 0]
    assert bool((index.row_TK == -1).all())
    assert int(index.schedule[0]) == 0
    exact, _ = index_slab(*arguments, 400, healthy=ranks.healthy, record=ranks.record)
    assert exact.offset_E.tolist() == [0, 200, 400]


@pytest.mark.gpu
def test_a_missing_rank_is_named_and_nothing_hangs(gpu: str) -> None:
    ranks = make_ranks(2, 10, 64, 2, timeout_s=0.3)
    x, expert, gate = draw(2, (10, 10), 64, 2, 4)
    plan = exchange.make_plan(ranks.links[0], expert[0].cuda())
    exchange.dispatch_tokens(ranks.links[0], ranks.slabs[0], x[0].cuda(), gate[0].cuda(), plan, 2, n_waves=1)
    exchange.await_rows(ranks.links[0], gradients=False)  # rank 1 sends nothing
    torch.cuda.synchronize()
    assert ranks.record.tolist()[:3] == [1, 1, 0]
    assert int(ranks.healthy) == 0


@pytest.mark.gpu
def test_words_wrap(gpu: str) -> None:
    """The greatest word, of the last exchange before they wrap, is not taken for the next exchange's."""
    ranks = make_ranks(2, 10, 64, 2, timeout_s=0.3)
    link = ranks.links[0]
    link._state[0] = 2**28 - 1  # exchanges that have ended, each of 8 parts
    link._kept[0][0][reference.ARRIVED * 2 + 1] = 2**31 - 1
    x, expert, gate = draw(2, (10, 10), 64, 2, 4)
    plan = exchange.make_plan(link, expert[0].cuda())
    exchange.dispatch_tokens(link, ranks.slabs[0], x[0].cuda(), gate[0].cuda(), plan, 2, n_waves=1)
    exchange.await_rows(link, gradients=False)  # rank 1 sends nothing
    torch.cuda.synchronize()
    assert ranks.record.tolist()[:3] == [1, 1, 0]


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
