"""One MoE layer over the GPUs of a host: tokens go out over NVLink, the owners' sums come back, the host waits for
nothing.

Shapes: T tokens of this rank, D width, F expert width, e experts of this rank, K slots, W ranks, N most tokens of a
rank, S = W·N slab rows, R most routed rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from nmoe.kernels.native import exchange_cuda as exchange
from nmoe.kernels.native import grouped_gemm_cuda as gemm
from nmoe.kernels.native.experts_cuda import aligned, check_accumulators, gradient_target
from nmoe.kernels.native.routing_cuda import MAX_TOP_K, RowIndex, Waves, index_slab
from nmoe.kernels.ops import Tier
from nmoe.kernels.reference.exchange import Plan, Returns, Slab
from nmoe.rdep.exchange import Gradients, Kept
from nmoe.rdep.faults import Faults


class GpuExchange:
    """See `nmoe.rdep.exchange.Exchange`: bf16, on GPUs that map each other's memory.

    Args:
        rank: this rank.
        words: int32 (`exchange_cuda.WORDS`·W) of each rank, 0.
        faults: where kernels report.
        timeout_s: how long a wait may take.
        device: this rank's GPU.
    """

    tier: Tier = "native"

    def __init__(
        self, rank: int, words: tuple[torch.Tensor, ...], faults: Faults, timeout_s: float, device: torch.device
    ) -> None:
        self._link = exchange.Link(rank, words, faults.record, faults.healthy, timeout_s, device)
        self._faults, self._rank = faults, rank
        self._beside = torch.cuda.Stream(device, priority=-1)  # what travels goes before what is computed
        self._sent: tuple[torch.Tensor, ...] = ()
        """What is on its way, kept alive."""

    def problems(self, dim: int, hidden: int, top_k: int, slab_rows: int, capacity: int) -> list[str]:
        """See `Exchange.problems`: rows move in pieces of 16 bytes, and the products count them in 32 bits."""
        rules = (
            (dim % 8 == 0, f"a width of a multiple of 8, found {dim}"),
            (hidden % 8 == 0, f"an expert width of a multiple of 8, found {hidden}"),
            (1 <= top_k <= MAX_TOP_K, f"1 to {MAX_TOP_K} experts a token, found {top_k}"),
            (slab_rows * dim < 1 << 31, f"less than 2^31 elements of all ranks' tokens, found {slab_rows} · {dim}"),
            (slab_rows * top_k < 1 << 30, f"fewer than 2^30 routed rows of all ranks, found {slab_rows} · {top_k}"),
            (capacity * hidden < 1 << 34, f"less than 2^34 elements of activations, found {capacity} · {hidden}"),
        )
        return [told for kept, told in rules if not kept]

    def send(
        self, slab: Slab, x_TD: torch.Tensor, expert_TK: torch.Tensor, gate_TK: torch.Tensor, n_local: int
    ) -> Plan:
        """See `Exchange.send`."""
        x_TD, gate_TK = aligned(x_TD), gate_TK.contiguous()
        self._sent = (x_TD, gate_TK)
        plan = exchange.make_plan(self._link, expert_TK)
        with self._travelling():
            exchange.dispatch_tokens(self._link, slab, x_TD, gate_TK, plan, n_local, n_waves=_n_waves(slab))
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
        """See `Exchange.finish`. Of many tokens, products begin with those that have come while others travel, and what
        is done returns while the rest is computed."""
        link, n_waves = self._link, _n_waves(slab)
        if n_waves > 1:
            exchange.await_choices(link)
        else:
            self._join()
            exchange.await_rows(link, gradients=False)
        index, waves = index_slab(
            slab.expert_WNK[self._rank].flatten(0, 1),
            slab.end_CW[self._rank][-n_waves:],
            w13_e2FD.shape[0],
            capacity,
            healthy=self._faults.healthy,
            record=self._faults.record,
        )
        compute = self._compute_in_waves if n_waves > 1 else self._compute
        pre_R2F = compute(slab, returns, index, waves, w13_e2FD, w2_eDF, keep)
        return exchange.collect_rows(link, returns, plan, w2_eDF.shape[1]), Kept(plan, index, pre_R2F)

    def _compute(
        self,
        slab: Slab,
        returns: Returns,
        index: RowIndex,
        waves: Waves,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        """The experts and the return of their sums; gives the pre-activations."""
        rank = self._rank
        activation_RF, pre_R2F = gemm.up(slab.x_WND[rank].flatten(0, 1), index, w13_e2FD, keep_pre=keep)
        y_RD = gemm.down(activation_RF, index, slab.gate_WNK[rank].flatten(0, 1), w2_eDF)
        exchange.return_rows(self._link, returns, y_RD, index.row_TK, slab.count_W[rank])
        return pre_R2F

    def _compute_in_waves(
        self,
        slab: Slab,
        returns: Returns,
        index: RowIndex,
        waves: Waves,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        """As `_compute`, while rows arrive and sums return."""
        link, rank = self._link, self._rank
        x_SD, gate_SK = slab.x_WND[rank].flatten(0, 1), slab.gate_WNK[rank].flatten(0, 1)
        activation_RF, pre_R2F = gemm.up(x_SD, index, w13_e2FD, keep_pre=keep, arriving=(link, waves))
        y_RD = x_SD.new_empty(activation_RF.shape[0], x_SD.shape[1])
        for wave in range(waves.entry_C.shape[0] - 1):
            gemm.down_wave(activation_RF, index, gate_SK, w2_eDF, y_RD, waves=waves, wave=wave)
            with self._travelling():
                exchange.return_wave(link, returns, y_RD, index.row_TK, slab.end_CW[rank], waves.ready_S, wave)
        self._join()
        return pre_R2F

    def send_gradients(self, slab: Slab, gradients: Slab, plan: Plan, dout_TD: torch.Tensor) -> None:
        """See `Exchange.send_gradients`."""
        dout_TD = aligned(dout_TD)
        self._sent = (dout_TD,)
        with self._travelling():
            exchange.dispatch_gradients(self._link, gradients, slab, dout_TD, plan)

    def finish_gradients(
        self,
        slab: Slab,
        gradients: Slab,
        returns: Returns,
        kept: Kept,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> Gradients:
        """See `Exchange.finish_gradients`. The rows' gradients return while the weights' are computed."""
        link, rank, index = self._link, self._rank, RowIndex(*kept.rows)
        check_accumulators((w13_e2FD, w2_eDF))
        self._join()
        exchange.await_rows(link, gradients=True)
        x_SD, dout_SD = slab.x_WND[rank].flatten(0, 1), gradients.x_WND[rank].flatten(0, 1)
        gate_SK = slab.gate_WNK[rank].flatten(0, 1)
        gated_RF, dpre_R2F, partial_PR = gemm.dgrad_activation(dout_SD, index, gate_SK, w2_eDF, kept.pre_R2F)
        dx_RD = gemm.dgrad_input(dpre_R2F, index, w13_e2FD)
        with self._travelling():
            exchange.return_rows(link, returns, dx_RD, index.row_TK, slab.count_W[rank], partial_PR)
        exchange.clear_tail(gated_RF, dpre_R2F, index.offset_E)
        (into13, add13, wants13), (into2, add2, wants2) = gradient_target(w13_e2FD), gradient_target(w2_eDF)
        if into2 is not None:
            gemm.wgrad_down(dout_SD, gated_RF, index, into2, add=add2)
        if into13 is not None:
            gemm.wgrad_up(dpre_R2F, x_SD, index, into13, add=add13)
        self._join()
        dx_TD, dgate_TK = exchange.collect_gradients(link, returns, kept.plan, dx_RD.shape[1], w13_e2FD.shape[0])
        return Gradients(
            dx_TD,
            dgate_TK,
            into13.to(w13_e2FD.dtype) if into13 is not None and wants13 else None,
            into2.to(w2_eDF.dtype) if into2 is not None and wants2 else None,
        )

    @contextmanager
    def _travelling(self) -> Iterator[None]:
        """Launches in this block come after all that the current stream holds so far, and beside what it gets later,
        until `_join`. What they read must stay until then: it belongs to the current stream's memory."""
        self._beside.wait_stream(torch.cuda.current_stream(self._link.device))
        with torch.cuda.stream(self._beside):
            yield

    def _join(self) -> None:
        torch.cuda.current_stream(self._link.device).wait_stream(self._beside)
        self._sent = ()


def _n_waves(slab: Slab) -> int:
    _, most_tokens, width = slab.x_WND[0].shape
    return exchange.waves_for(most_tokens, width)
