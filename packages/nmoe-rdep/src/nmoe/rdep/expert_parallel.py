"""Expert parallelism: the experts of a layer are spread over ranks, and token rows go to them and back.

Shapes: T tokens of this rank, D width, F expert width, E experts in all, e experts of this rank, K experts per token, W
ranks, N most tokens of a rank, R most routed rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.exchange import WORDS, Plan, Returns, Slab
from nmoe.rdep.errors import RdepError, TransportUnavailableError
from nmoe.rdep.exchange import Exchange, Kept
from nmoe.rdep.faults import Faults
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.slabs import allocate_returns, allocate_slab, allocate_words
from nmoe.rdep.symmetric import SymmetricMemory
from nmoe.rdep.transport import Beside, ExpertLayer
from nmoe.rdep.world import World
from torch.autograd.function import once_differentiable


class ExpertParallel:
    """The transport of W ranks of one host; see `nmoe.rdep.transport.Transport`.

    Each layer has a slab of its own, where all ranks' tokens land and stay for the backward; all layers share one slab
    for gradients and one place for what comes back.

    Args:
        config: the `[rdep]` section.
        world: two ranks or more.
        max_tokens: N.
        dtype: of tokens: bf16 on GPUs.
    """

    def __init__(self, config: RdepConfig, world: World, *, max_tokens: int, dtype: torch.dtype) -> None:
        self.world = world
        self.faults = Faults(world.device, timeout_s=config.timeout_s)
        self._config, self._max_tokens, self._dtype = config, max_tokens, dtype
        self._memory, self._exchange = _open(config, world, self.faults)
        self._shared: tuple[tuple[int, int], Slab, Returns] | None = None

    def n_local(self, n_experts: int) -> int:
        """How many of `n_experts` experts this rank owns.

        Raises:
            RdepError: they do not divide among the ranks.
        """
        if n_experts % self.world.size:
            raise RdepError(
                f"expected experts that divide among {self.world.size} ranks, found {n_experts}: choose another number "
                "of ranks or of experts"
            )
        return n_experts // self.world.size

    def layer(self, dim: int, top_k: int, n_experts: int) -> ExpertLayer:
        """See `Transport.layer`.

        Raises:
            RdepError: the experts do not divide among the ranks, or an earlier layer had another width or K.
            SymmetricMemoryError: the memory for it cannot be had.
        """
        n_local, sizes = self.n_local(n_experts), (self._max_tokens, dim, top_k, self._dtype)
        rank, world = self.world.rank, self.world.size
        if self._shared is None:
            self.faults.even_rows = self._max_tokens * top_k
            gradients = allocate_slab(self._memory, rank, world, *sizes)
            self._shared = (dim, top_k), gradients, allocate_returns(self._memory, world, *sizes)
        widths, gradients, returns = self._shared
        if widths != (dim, top_k):
            raise RdepError(
                f"expected layers of width {widths[0]} with {widths[1]} experts a token, as the first one has, found "
                f"{dim} and {top_k}: give all MoE layers the same"
            )
        slab = allocate_slab(self._memory, rank, world, *sizes)
        capacity = self._config.row_capacity(self._max_tokens, top_k, n_local, world)
        return _Layer(self._exchange, slab, gradients, returns, capacity, n_experts)

    @property
    def shared_bytes(self) -> int:
        """See `Transport.shared_bytes`."""
        return self._memory.allocated

    def close(self) -> None:
        """See `Transport.close`. No layer may be used any more."""
        if not self.faults.found:  # else the device may wait for a rank for ever: the memory goes with the process
            self._memory.close()


def _open(config: RdepConfig, world: World, faults: Faults) -> tuple[SymmetricMemory, Exchange]:
    rank, words = world.rank, WORDS * world.size
    if world.device.type == "cuda":
        from nmoe.kernels.native.grouped_gemm_cuda import ARCHES as GROUPED_ARCHES
        from nmoe.rdep.exchange_gpu import GpuExchange
        from nmoe.rdep.ipc import IpcMemory

        arch = detect_arch(world.device)
        if arch not in GROUPED_ARCHES:
            raise TransportUnavailableError(
                f"expected one of {', '.join(GROUPED_ARCHES)} for expert parallelism on GPUs, found {arch}: train on "
                "one GPU, with runtime.world_size = 1"
            )
        on_gpus = IpcMemory(world)
        return on_gpus, GpuExchange(rank, allocate_words(on_gpus, words), faults, config.timeout_s, world.device)
    from nmoe.rdep.exchange_cpu import CpuExchange
    from nmoe.rdep.shm import SharedMemory

    on_cpus = SharedMemory(world)
    return on_cpus, CpuExchange(rank, allocate_words(on_cpus, words), faults, config.timeout_s)


class _Layer:
    """One layer's slab, and what it shares with the others."""

    def __init__(
        self,
        exchange: Exchange,
        slab: Slab,
        gradients: Slab,
        returns: Returns,
        capacity: int,
        n_experts: int,
    ) -> None:
        self.exchange, self.slab, self.gradients, self.returns = exchange, slab, gradients, returns
        self.capacity, self.n_experts = capacity, n_experts
        self.calls = 0

    def __call__(
        self,
        ops: Ops,
        x_TD: torch.Tensor,
        routing: Any,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
        beside: Callable[[], Beside],
    ) -> tuple[torch.Tensor, torch.Tensor, Beside]:
        """See `ExpertLayer`.

        Raises:
            TransportUnavailableError: the ops are of another tier than this device's exchange.
            RdepError: a tensor is not as the layer was made for. Nothing has been sent then.
        """
        if ops.tier != self.exchange.tier:
            raise TransportUnavailableError(
                f"expected {self.exchange.tier} kernels for expert parallelism on this device, found {ops.tier}: set "
                f"runtime.kernels = '{self.exchange.tier}', or run one rank"
            )
        self._check(x_TD, routing.expert_TK, routing.gate_TK, w13_e2FD, w2_eDF)
        self.calls += 1
        flight = _Flight(self, keep=torch.is_grad_enabled())
        sent = _Send.apply(flight, x_TD, routing.expert_TK, routing.gate_TK, w13_e2FD, w2_eDF)
        other = beside()
        out_TD = _Finish.apply(flight, sent, w13_e2FD, w2_eDF)
        return out_TD, _load(routing.expert_TK, self.n_experts), other

    def _check(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        gate_TK: torch.Tensor,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> None:
        """Before anything is sent: a rank that fails later keeps the others waiting."""
        world, most, dim = self.slab.x_WND[0].shape
        top_k, n_local, hidden = self.slab.expert_WNK[0].shape[2], self.n_experts // world, w2_eDF.shape[-1]
        tokens, dtype = x_TD.shape[0], self.slab.x_WND[0].dtype
        rules = (
            (x_TD.shape[1:] == (dim,) and x_TD.dtype == dtype, f"tokens (T, {dim}) of {dtype}", x_TD),
            (tokens <= most, f"at most {most} tokens of a rank at once", x_TD),
            (expert_TK.shape == (tokens, top_k), f"experts ({tokens}, {top_k})", expert_TK),
            (gate_TK.shape == (tokens, top_k), f"gates ({tokens}, {top_k})", gate_TK),
            (
                w13_e2FD.shape == (n_local, 2, hidden, dim) and w13_e2FD.dtype == dtype and w13_e2FD.is_contiguous(),
                f"contiguous w13 ({n_local}, 2, {hidden}, {dim}) of {dtype}",
                w13_e2FD,
            ),
            (
                w2_eDF.shape == (n_local, dim, hidden) and w2_eDF.dtype == dtype and w2_eDF.is_contiguous(),
                f"contiguous w2 ({n_local}, {dim}, {hidden}) of {dtype}",
                w2_eDF,
            ),
        )
        for kept, expected, found in rules:
            if not kept:
                raise RdepError(
                    f"expected {expected} for a layer of {world} ranks, found {tuple(found.shape)} of {found.dtype}: "
                    "give the layer what it was made for"
                )
        problems = self.exchange.problems(dim, hidden, top_k, world * most, self.capacity)
        if problems:
            raise RdepError(
                f"expected {'; '.join(problems)}: change the model, or lower train.micro_batch_size or the ranks"
            )


def _load(expert_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """int32 (E): rows of each expert."""
    flat = expert_TK.flatten().long()
    load_E = torch.zeros(n_experts, dtype=torch.int32, device=flat.device)
    return load_E.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


class _Flight:
    """One call of a layer, on its way through two nodes of autograd's graph. Between them, forward and backward, stands
    what is computed beside: autograd runs the nodes of a graph backwards in the order in which they were made."""

    def __init__(self, layer: _Layer, *, keep: bool) -> None:
        self.layer, self.keep = layer, keep
        self.plan: Plan | None = None
        self.kept: Kept | None = None


class _Send(torch.autograd.Function):
    """Forward: sends the tokens. Backward, which comes last: all that follows the sending of the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        flight: _Flight,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        gate_TK: torch.Tensor,
        w13_e2FD: torch.Tensor,
        w2_eDF: torch.Tensor,
    ) -> torch.Tensor:
        layer = flight.layer
        flight.plan = layer.exchange.send(layer.slab, x_TD, expert_TK, gate_TK, w13_e2FD.shape[0])
        ctx.flight = flight
        ctx.weights = (w13_e2FD, w2_eDF)  # the very parameters: their main_grad is looked up when the gradient is there
        return x_TD.new_empty(0)  # stands for what is under way

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, kept = ctx.flight.layer, ctx.flight.kept
        ctx.flight.kept = None
        found = layer.exchange.finish_gradients(layer.slab, layer.gradients, layer.returns, kept, *ctx.weights)
        return None, found.dx_TD, None, found.dgate_TK, found.dw13_e2FD, found.dw2_eDF


class _Finish(torch.autograd.Function):
    """Forward: all that follows the sending of the tokens. Backward, which comes first: sends the gradients."""

    @staticmethod
    def forward(
        ctx: Any, flight: _Flight, sent: torch.Tensor, w13_e2FD: torch.Tensor, w2_eDF: torch.Tensor
    ) -> torch.Tensor:
        layer, plan = flight.layer, flight.plan
        assert plan is not None, "what is finished was sent"
        out_TD, kept = layer.exchange.finish(
            layer.slab, layer.returns, layer.capacity, plan, w13_e2FD, w2_eDF, keep=flight.keep
        )
        ctx.flight, flight.plan = flight, None
        # As autograd's own, so that a layer that is to be computed again keeps none of it.
        ctx.save_for_backward(torch.tensor(layer.calls), *kept.plan, *kept.rows, kept.pre_R2F)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer = ctx.flight.layer
        call, expert_TK, ordinal_TW, *rows, pre_R2F = ctx.saved_tensors
        if int(call) != layer.calls:
            raise RdepError(
                f"expected the backward of a layer's last call, number {layer.calls}, found that of call {int(call)}, "
                "whose tokens are gone: call backward before the layer is called again"
            )
        kept = Kept(Plan(expert_TK, ordinal_TW), tuple(rows), pre_R2F)
        layer.exchange.send_gradients(layer.slab, layer.gradients, kept.plan, grads[0])
        ctx.flight.kept = kept
        return None, grads[0].new_empty(0), None, None
