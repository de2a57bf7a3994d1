"""The exchange's reference: every routed row has one place, and what comes back is the sum over experts."""

import pytest
import torch
from nmoe.kernels.reference.exchange import (
    gather_gates,
    index_slab,
    local_experts,
    plan_dispatch,
    sum_owners,
    sum_slots,
)


@pytest.mark.parametrize(
    ("world", "tokens", "top_k", "n_experts"),
    [(2, (5, 3), 1, 2), (2, (30, 0), 4, 6), (3, (33, 40, 7), 3, 9), (4, (70, 71, 65, 1), 8, 32), (1, (9,), 2, 4)],
)
def test_rows_go_out_and_come_back(world: int, tokens: tuple[int, ...], top_k: int, n_experts: int) -> None:
    """Each expert multiplies its rows by its own number; the sums are those of a loop over tokens."""
    n_local, width, most = n_experts // world, 5, max(tokens)
    x = [torch.randn(n, width, dtype=torch.float64) for n in tokens]
    expert = [torch.rand(n, n_experts).argsort(1)[:, :top_k].int() for n in tokens]
    factor_E = torch.randn(n_experts, dtype=torch.float64)
    plans = [plan_dispatch(expert_TK, n_local, world) for expert_TK in expert]
    returned = torch.zeros(world, world, most, width, dtype=torch.float64)  # source, owner
    dgate = torch.zeros(world, world, most, top_k)
    n_rows = 0
    for owner in range(world):
        slab = torch.zeros(world, most, width, dtype=torch.float64)
        expert_WNK = torch.full((world, most, top_k), n_local - 1, dtype=torch.int32)  # past the counts: to be ignored
        count_W = torch.zeros(world, dtype=torch.int32)
        for source in range(world):
            ordinal_T = plans[source].ordinal_TW[:, owner]
            sent = ordinal_T >= 0
            assert ordinal_T[sent].tolist() == list(range(int(sent.sum())))
            count_W[source] = int(sent.sum())
            slab[source, : count_W[source]] = x[source][sent]
            expert_WNK[source, : count_W[source]] = local_experts(expert[source], owner, n_local)[sent]
        index = index_slab(expert_WNK.flatten(0, 1), count_W[None], n_local)
        local_R = expert_WNK.flatten()[index.order_R]
        assert torch.equal(local_R, local_R.sort(stable=True).values)
        key_R = local_R.long() * index.row_TK.numel() + index.order_R
        assert bool((key_R.diff() > 0).all()), "rows stand by expert, source, token, slot"
        assert torch.equal(index.offset_E.diff(), torch.bincount(local_R, minlength=n_local))
        n_rows += index.order_R.numel()
        token_R = index.order_R // top_k
        y_RD = slab.flatten(0, 1)[token_R] * factor_E[owner * n_local + local_R, None]
        returned[:, owner] = sum_slots(y_RD, index.row_TK).view(world, most, width)
        here = index.row_TK >= 0
        dgate[:, owner] = torch.where(here, expert_WNK.flatten(0, 1) + owner * n_local, -1).view(world, most, top_k)
    assert n_rows == sum(tokens) * top_k
    for source in range(world):
        want = x[source] * factor_E[expert[source]].sum(1, keepdim=True)
        torch.testing.assert_close(sum_owners(returned[source], plans[source]), want)
        assert torch.equal(gather_gates(dgate[source], plans[source], n_local), expert[source].float())


def test_sums_keep_their_order() -> None:
    """bf16: rounding tells one order of adding from another."""
    y_RD = torch.tensor([[1.0], [2**-9], [2**-9], [-1.0]]).bfloat16()
    row_SK = torch.tensor([[0, 1, 2, -1], [3, 0, 1, -1], [-1, -1, -1, -1]])
    assert sum_slots(y_RD, row_SK).flatten().tolist() == [1.0, 2**-9, 0.0]  # in fp32, rounded once: ties to even
