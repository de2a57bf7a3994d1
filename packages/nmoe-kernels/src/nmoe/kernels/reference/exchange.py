"""The exchange of token rows between ranks: where rows land, who gets which, and the sums on their way back.

A token goes to each rank that owns one of its experts, once. Its row there is its ordinal among the tokens that its
source sends to that owner, which the source knows alone. The owner orders what has come by local expert, source, token
and slot, sums a token's rows and sends one row back; the source sums over owners in rank order.

Tokens may travel in waves, which are runs of a source's tokens: their owner can begin with a wave while the next is on
its way. Rows of one expert then stand by wave first.

Shapes: T tokens of this rank, D width, K slots, e experts of a rank, W ranks, N most tokens of a rank, S = W·N slab
rows, R routed rows, C waves. Tuples hold one tensor a rank, each in that rank's memory.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from nmoe.kernels.reference.routing import RowIndex

ARRIVED, RETURNED, CONSUMED = range(3)
"""Flags between two ranks, each the number of the last exchange of which it tells: a source's rows are at their owner,
an owner's sums are at the source, an owner has read all that it was sent. As `Word` in cuda/link.cuh, where ARRIVED
counts parts of exchanges."""
WORDS = 3
WAVES = 2
"""That a slab can tell apart. Wave c of a source's T tokens goes up to, not including, token T·(c + 1) // WAVES."""


@dataclass(frozen=True)
class Slab:
    """Where the tokens of all ranks land on each rank, by rank."""

    x_WND: tuple[torch.Tensor, ...]
    expert_WNK: tuple[torch.Tensor, ...]
    """int32: the owner's local expert of each slot, -1 for another rank's."""
    gate_WNK: tuple[torch.Tensor, ...]
    """fp32."""
    end_CW: tuple[torch.Tensor, ...]
    """int32 (WAVES, W): how many of its N rows each source sends up to the end of a wave; the last is all. Where tokens
    do not travel in waves, only the last is told."""
    used: torch.Tensor
    """int32 word of this rank: number of the last exchange that reads what it sent here."""

    @property
    def count_W(self) -> tuple[torch.Tensor, ...]:
        """int32: how many of its N rows each source sent."""
        return tuple(end_CW[-1] for end_CW in self.end_CW)


@dataclass(frozen=True)
class Returns:
    """Where the owners' sums land on each rank, by rank."""

    y_WND: tuple[torch.Tensor, ...]
    dgate_WNK: tuple[torch.Tensor, ...]
    """fp32 gradients of gates."""


class Plan(NamedTuple):
    """Where the tokens of one dispatch go."""

    expert_TK: torch.Tensor
    """Global experts."""
    ordinal_TW: torch.Tensor
    """int32: a token's row among those that this rank sends to each owner; -1: it is not sent there."""


def plan_dispatch(expert_TK: torch.Tensor, n_local: int, world: int) -> Plan:
    """Which rows the tokens get at the owners of their experts, `n_local` of which are each rank's."""
    owner_TK = expert_TK // n_local
    sent_TW = torch.stack([(owner_TK == owner).any(1) for owner in range(world)], dim=1)
    ordinal_TW = torch.where(sent_TW, sent_TW.cumsum(0) - 1, -1)
    return Plan(expert_TK, ordinal_TW.to(torch.int32))


def local_experts(expert_TK: torch.Tensor, owner: int, n_local: int) -> torch.Tensor:
    """The owner's local expert of each slot, int32; -1 where another rank owns it."""
    local_TK = expert_TK - owner * n_local
    return torch.where((local_TK >= 0) & (local_TK < n_local), local_TK, -1).to(torch.int32)


def index_slab(expert_SK: torch.Tensor, end_CW: torch.Tensor, n_experts: int) -> RowIndex:
    """The order of what all ranks sent: rows by local expert, then wave, then source, then token, then slot.

    A slab row s = source·N + ordinal counts as a token. `row_TK`, here (S, K), is -1 where a slab row, or its slot, has
    no row.
    """
    (slab_rows, top_k), (n_waves, world) = expert_SK.shape, end_CW.shape
    ordinal_S = torch.arange(slab_rows) % (slab_rows // world)
    wave_S = (ordinal_S >= end_CW.repeat_interleave(slab_rows // world, dim=1)).sum(0)
    here_SK = (wave_S < n_waves)[:, None] & (expert_SK >= 0)
    flat = torch.where(here_SK, expert_SK * n_waves + wave_S[:, None], n_experts * n_waves).reshape(-1)
    sorted_key, order = torch.sort(flat, stable=True)
    offset_E = torch.searchsorted(sorted_key, torch.arange(n_experts + 1) * n_waves).to(torch.int32)
    order_R = order[: int(offset_E[-1])]
    row_SK = torch.full_like(flat, -1, dtype=torch.int64)
    row_SK[order_R] = torch.arange(order_R.numel())
    return RowIndex(order_R, row_SK.view(slab_rows, top_k), offset_E)


def sum_slots(y_RD: torch.Tensor, row_SK: torch.Tensor) -> torch.Tensor:
    """A slab row's rows summed in slot order, in fp32 or wider, and rounded once; slots without a row count as zero."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    out_SD = torch.zeros(row_SK.shape[0], y_RD.shape[1], dtype=wide)
    for row_S in row_SK.unbind(1):
        here = row_S >= 0
        out_SD[here] += y_RD[row_S[here]]
    return out_SD.to(y_RD.dtype)


def sum_owners(y_WND: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A token's returned rows summed over owners, in rank order, in fp32 or wider, and rounded once: (T, D)."""
    wide = torch.promote_types(y_WND.dtype, torch.float32)
    out_TD = torch.zeros(plan.ordinal_TW.shape[0], y_WND.shape[2], dtype=wide)
    for y_ND, ordinal_T in zip(y_WND, plan.ordinal_TW.unbind(1), strict=True):
        sent = ordinal_T >= 0
        out_TD[sent] += y_ND[ordinal_T[sent].long()]
    return out_TD.to(y_WND.dtype)


def gather_gates(dgate_WNK: torch.Tensor, plan: Plan, n_local: int) -> torch.Tensor:
    """Of what the owners returned, the gradient of each token's gates: (T, K)."""
    owner_TK = (plan.expert_TK // n_local).long()
    ordinal_TK = plan.ordinal_TW.long().gather(1, owner_TK)
    slot_TK = torch.arange(owner_TK.shape[1]).expand_as(owner_TK)
    return dgate_WNK[owner_TK, ordinal_TK, slot_TK]
