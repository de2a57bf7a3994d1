"""One MoE layer over CPU ranks that share memory: the GPUs' plan, layout and flags, in PyTorch.

Shapes: T tokens of this rank, D width, F expert width, e experts of this rank, K slots, W ranks, N most tokens of a
rank, S = W·N slab rows, R routed rows.
"""

import time

import torch
from nmoe.kernels.ops import Tier
from nmoe.kernels.reference.exchange import (
    ARRIVED,
    CONSUMED,
    RETURNED,
    Plan,
    Returns,
    Slab,
    gather_gates,
    index_slab,
    local_experts,
    plan_dispatch,
    sum_owners,
    sum_slots,
)
from nmoe.kernels.reference.experts import GroupedGemms, expert_rows, expert_rows_backward
from nmoe.kernels.reference.grouped_gemm import grouped_gemm, grouped_wgrad
from nmoe.kernels.reference.routing import RowIndex
from nmoe.rdep.exchange import Gradients, Kept
from nmoe.rdep.faults import PHASES, Faults
from nmoe.rdep.shm import post, wait

_GEMMS = GroupedGemms(grouped_gemm, grouped_wgrad)


class CpuExchange:
    """See `nmoe.rdep.exchange.Exchange`: any float dtype, ranks on CPUs that share memory.

    A wait that passes its deadline raises at once: there is no kernel that would have to come to its end first.

    Args:
        rank: this rank.
        words: int32 (3·W) of each rank, 0: what has arrived, returned and been consumed, by the rank that posts.
        faults: where an overflow is told.
        timeout_s: how long a wait may take.
    """

    tier: Tier = "reference"

    def __init__(self, rank: int, words: tuple[torch.Tensor, ...], faults: Faults, timeout_s: float) -> None:
        self._rank, self._world, self._words = rank, len(words), words
        self._faults, self._timeout_s = faults, timeout_s
        self._ended = 0
        """Exchanges that have ended, the same on all ranks."""

    def problems(self, dim: int, hidden: int, top_k: int, slab_rows: int, capacity: int) -> list[str]:
        """None: PyTorch takes all sizes."""
        return []

    def send(
        self, slab: Slab, x_TD: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor, n_local: int
    ) -> Plan:
        """See `Exchange.send`."""
        rank, plan = self._rank, plan_dispatch(expert_TK, n_local, self._world)
        self._await(CONSUMED, int(slab.used), "consumed")
        for owner, ordinal_T in enumerate(plan.ordinal_TW.unbind(1)):
            sent = ordinal_T >= 0
            count = int(sent.sum())
            slab.x_WND[owner][rank, :count] = x_TD[sent]
            slab.expert_WNK[owner][rank, :count] = local_experts(expert_TK[sent], owner, n_local)
            slab.gate_WNK[owner][rank, :count] = gate_TK[sent]
            slab.count_W[owner][rank] = count
        self._post_all(ARRIVED)
        slab.used.fill_(self._ended + 1)
        return plan

    def finish(
        self,
        slab: Slab,
        returns: Returns,
        capacity: int,
        plan: Plan,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, Kept]:
        """See `Exchange.finish`."""
        self._await(ARRIVED, self._ended + 1, "dispatch")
        index = self._index(slab, w13_e2FD.shape[0], capacity)
        token_R, gate_R = self._rows(slab, index)
        x_SD = slab.x_WND[self._rank].flatten(0, 1)
        y_RD, pre_R2F = expert_rows(_GEMMS, x_SD, token_R, index.offset_E, w13_e2FD, w2_eDF)
        self._return(returns, slab, sum_slots(y_RD.to(gate_R.dtype) * gate_R[:, None], index.row_TK))
        out_TD = self._collect(returns, plan, "return")
        return out_TD, Kept(plan, index, pre_R2F if keep else pre_R2F[:0])

    def send_gradients(self, slab: Slab, gradients: Slab, plan: Plan, dout_TD: torch.Tensor) -> None:
        """See `Exchange.send_gradients`."""
        self._await(CONSUMED, int(gradients.used), "consumed")
        for owner, ordinal_T in enumerate(plan.ordinal_TW.unbind(1)):
            sent = ordinal_T >= 0
            gradients.x_WND[owner][self._rank, : int(sent.sum())] = dout_TD[sent]
        self._post_all(ARRIVED)
        gradients.used.fill_(self._ended + 1)
        slab.used.fill_(self._ended + 1)

    def finish_gradients(
        self,
        slab: Slab,
        gradients: Slab,
        returns: Returns,
        kept: Kept,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> Gradients:
        """See `Exchange.finish_gradients`."""
        rank, n_local, index = self._rank, w13_e2FD.shape[0], RowIndex(*kept.rows)
        self._await(ARRIVED, self._ended + 1, "gradient dispatch")
        token_R, gate_R = self._rows(slab, index)
        x_SD, dout_SD = slab.x_WND[rank].flatten(0, 1), gradients.x_WND[rank].flatten(0, 1)
        rows = expert_rows_backward(
            _GEMMS, dout_SD, x_SD, token_R, gate_R, kept.pre_R2F, index.offset_E, w13_e2FD, w2_eDF
        )
        here = index.row_TK >= 0
        dgate_SK = slab.gate_WNK[rank].flatten(0, 1).new_zeros(here.shape)
        dgate_SK[here] = rows.dgate_R[index.row_TK[here]].to(dgate_SK.dtype)
        self._return(returns, slab, sum_slots(rows.dx_RD, index.row_TK), dgate_SK)
        dx_TD = self._collect(returns, kept.plan, "gradient return")
        dgate_TK = gather_gates(returns.dgate_WNK[rank], kept.plan, n_local)
        return Gradients(dx_TD, dgate_TK, rows.dw13, rows.dw2)

    def _index(self, slab: Slab, n_local: int, capacity: int) -> RowIndex:
        expert_SK, count_1W = slab.expert_WNK[self._rank].flatten(0, 1), slab.end_CW[self._rank][-1:]
        index = index_slab(expert_SK, count_1W, n_local)
        if index.order_R.numel() <= capacity:
            return index
        self._faults.report_overflow(index.order_R.numel(), capacity)
        return index_slab(expert_SK, torch.zeros_like(count_1W), n_local)

    def _rows(self, slab: Slab, index: RowIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """The slab row and the gate of each routed row."""
        gate_SK = slab.gate_WNK[self._rank].flatten(0, 1)
        return index.order_R // gate_SK.shape[1], gate_SK.flatten()[index.order_R]

    def _return(self, returns: Returns, slab: Slab, sum_SD: torch.Tensor, dgate_SK: torch.Tensor | None = None) -> None:
        most_tokens = slab.x_WND[self._rank].shape[1]
        for source, count in enumerate(slab.count_W[self._rank].tolist()):
            rows = slice(source * most_tokens, source * most_tokens + count)
            returns.y_WND[source][self._rank, :count] = sum_SD[rows]
            if dgate_SK is not None:
                returns.dgate_WNK[source][self._rank, :count] = dgate_SK[rows]
        self._post_all(RETURNED)

    def _collect(self, returns: Returns, plan: Plan, phase: str) -> torch.Tensor:
        """Ends the exchange, of which this rank has read all that it was sent."""
        self._post_all(CONSUMED)
        self._await(RETURNED, self._ended + 1, phase)
        self._ended += 1
        return sum_owners(returns.y_WND[self._rank], plan)

    def _post_all(self, word: int) -> None:
        for peer_words in self._words:
            post(peer_words, word * self._world + self._rank, self._ended + 1)

    def _await(self, word: int, number: int, phase: str) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        for peer in range(self._world):
            if not wait(self._words[self._rank], word * self._world + peer, number, deadline_s):
                self._faults.report_timeout(peer, PHASES.index(phase))
                self._faults.check()
