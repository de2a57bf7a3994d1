"""The balance loss in CUDA: one read of the logits forward, one read and one write backward, all in fp32.

Each sequence is cut into equal blocks of tokens, whose number depends on no GPU. A block sums its tokens' shares and
counts their choices; blocks are then summed in their order, and no float is added by an atomic: same inputs, same bits.

With score s, its sum S over experts, count n_e of a sequence's L tokens that chose expert e, and
c_e = weight · E/K · n_e/L · 1/L, the loss is Σ_e c_e · Σ_t s_e/S. Its gradient in a logit is
s_e (1 - s_e)/S · (c_e - Σ_j c_j s_j/S): all that the backward needs beside the logits is c.

Shapes: T tokens, E experts, K experts per token, G sequences, P blocks of all sequences.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel
from torch.autograd.function import once_differentiable

_ARCHES = ("sm_90a", "sm_100a")
_MAX_EXPERTS = 4096
_WARPS = 8
"""Of a block."""
_NEIGHBOURS = 4
"""Experts that a lane reads at once, 16 bytes."""
_FINISH_COLUMNS, _FINISH_THREADS = 32, 1024  # as balance.cu has them


@dataclass(frozen=True)
class Plan:
    """How a number of experts is worked on; the first two are balance.cu's macros."""

    lanes: int
    """That share a token."""
    pieces: int
    """Of neighbouring experts that a lane has; 0: any number of experts."""
    tokens: int
    """Of a block, forward."""
    backward_tokens: int
    """Of a block, backward."""

    @property
    def max_experts(self) -> int:
        """Whose number is a multiple of `_NEIGHBOURS`."""
        return self.lanes * self.pieces * _NEIGHBOURS

    def kernel(self, entry: str) -> CudaKernel:
        """One of the two that read logits."""
        defines = (("WARPS", _WARPS), ("LANES", self.lanes), ("PIECES", self.pieces))
        name = f"{entry}_e{self.max_experts}" if self.pieces else f"{entry}_any"
        return CudaKernel(CudaSource(name, "balance.cu", entry, _ARCHES, defines))


_PLANS = tuple(
    Plan(*sizes) for sizes in ((8, 2, 64, 32), (16, 2, 64, 64), (32, 2, 128, 128), (32, 4, 128, 128), (32, 8, 128, 128))
)
_ANY = Plan(32, 0, 128, 128)

_SHARES = {plan: plan.kernel("balance_shares") for plan in (*_PLANS, _ANY)}
_BACKWARD = {plan: plan.kernel("balance_backward") for plan in (*_PLANS, _ANY)}
_FINISH = CudaKernel(
    CudaSource("balance_finish", "balance.cu", "balance_finish", _ARCHES, _SHARES[_ANY].source.defines)
)
SOURCES = tuple(kernel.source for kernel in (*_SHARES.values(), *_BACKWARD.values(), _FINISH))
"""Every compile of this module."""


class _SharesParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "expert", "share", "count", "ticket")),
        *((name, ctypes.c_uint32) for name in ("n_experts", "top_k", "length", "tokens", "blocks")),
    )


class _FinishParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("share", "count", "coefficient", "losses", "loss", "ticket")),
        *((name, ctypes.c_uint32) for name in ("n_experts", "blocks")),
        ("scale", ctypes.c_float),
    )


class _BackwardParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("dloss", "logits", "coefficient", "dlogits")),
        *((name, ctypes.c_uint32) for name in ("n_experts", "length", "tokens", "blocks")),
    )


def balance_loss(logits_TE: torch.Tensor, expert_TK: torch.Tensor, *, n_sequences: int, weight: float) -> torch.Tensor:
    """See `nmoe.kernels.reference.balance.balance_loss`. Autograd keeps the logits, and fp32 (G, E).

    Args:
        logits_TE: fp32, on a CUDA device; E ≤ 4096.
        expert_TK: int32; each token's K different experts, which is not checked. Fewer than 2^31 in all.
        n_sequences: G, a divisor of T.
        weight: of each sequence's loss.

    Raises:
        ShapeError: a shape, dtype or device is not as above.
    """
    _check(logits_TE, expert_TK, n_sequences)
    loss: torch.Tensor = _BalanceLoss.apply(logits_TE, expert_TK, n_sequences, weight)
    return loss


def _check(logits_TE: torch.Tensor, expert_TK: torch.Tensor, n_sequences: int) -> None:
    fits = (
        logits_TE.dtype == torch.float32
        and expert_TK.dtype == torch.int32
        and logits_TE.dim() == expert_TK.dim() == 2
        and logits_TE.shape[0] == expert_TK.shape[0]
        and 1 <= expert_TK.shape[1] <= logits_TE.shape[1] <= _MAX_EXPERTS
        and expert_TK.numel() < 1 << 31
        and logits_TE.is_cuda
        and logits_TE.device == expert_TK.device
    )
    if not fits:
        raise ShapeError(
            "expected logits (T, E) of torch.float32 and experts (T, K) of torch.int32 on one CUDA device, with "
            f"1 ≤ K ≤ E ≤ {_MAX_EXPERTS} and T·K < 2^31; found {tuple(logits_TE.shape)} of {logits_TE.dtype} on "
            f"{logits_TE.device} and {tuple(expert_TK.shape)} of {expert_TK.dtype} on {expert_TK.device}: give what "
            "the native route gives, or set runtime.kernels = 'reference'"
        )
    n_tokens = logits_TE.shape[0]
    if n_tokens < 1 or n_sequences < 1 or n_tokens % n_sequences:
        raise ShapeError(
            f"expected tokens of one or more sequences of one length, found {n_tokens} tokens of {n_sequences} "
            "sequences: give whole sequences"
        )


class _BalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, expert_TK: torch.Tensor, n_sequences: int, weight: float
    ) -> torch.Tensor:
        logits_TE, expert_TK = logits_TE.contiguous(), expert_TK.contiguous()
        (n_tokens, n_experts), top_k = logits_TE.shape, expert_TK.shape[1]
        length, plan = n_tokens // n_sequences, _plan(logits_TE)
        blocks = -(-length // plan.tokens)
        share_PE = logits_TE.new_empty(n_sequences * blocks, n_experts)
        count_PE = expert_TK.new_empty(n_sequences * blocks, n_experts)
        coefficient_GE = logits_TE.new_empty(n_sequences, n_experts)
        columns = -(-n_experts // _FINISH_COLUMNS)
        loss, losses_GN = logits_TE.new_empty(()), logits_TE.new_empty(n_sequences, columns)
        ticket = expert_TK.new_empty(1)
        shares = _SharesParams(
            logits=logits_TE.data_ptr(),
            expert=expert_TK.data_ptr(),
            share=share_PE.data_ptr(),
            count=count_PE.data_ptr(),
            ticket=ticket.data_ptr(),
            n_experts=n_experts,
            top_k=top_k,
            length=length,
            tokens=plan.tokens,
            blocks=blocks,
        )
        finish = _FinishParams(
            share=share_PE.data_ptr(),
            count=count_PE.data_ptr(),
            coefficient=coefficient_GE.data_ptr(),
            losses=losses_GN.data_ptr(),
            loss=loss.data_ptr(),
            ticket=ticket.data_ptr(),
            n_experts=n_experts,
            blocks=blocks,
            scale=weight * n_experts / (top_k * length**2),
        )
        with torch.cuda.device_of(logits_TE):
            shared_bytes = 4 * n_experts * (1 + _WARPS)
            _SHARES[plan].launch((n_sequences * blocks, 1, 1), 32 * _WARPS, shared_bytes, shares)
            _FINISH.launch((n_sequences, columns, 1), _FINISH_THREADS, 0, finish)
        ctx.save_for_backward(logits_TE, coefficient_GE)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TE, coefficient_GE = ctx.saved_tensors
        dlogits_TE, (n_tokens, n_experts) = torch.empty_like(logits_TE), logits_TE.shape
        n_sequences, plan = coefficient_GE.shape[0], _plan(logits_TE)
        length = n_tokens // n_sequences
        blocks = -(-length // plan.backward_tokens)
        params = _BackwardParams(
            dloss=grads[0].data_ptr(),
            logits=logits_TE.data_ptr(),
            coefficient=coefficient_GE.data_ptr(),
            dlogits=dlogits_TE.data_ptr(),
            n_experts=n_experts,
            length=length,
            tokens=plan.backward_tokens,
            blocks=blocks,
        )
        with torch.cuda.device_of(logits_TE):
            _BACKWARD[plan].launch((n_sequences * blocks, 1, 1), 32 * _WARPS, 0, params)
        return dlogits_TE, None, None, None


def _plan(logits_TE: torch.Tensor) -> Plan:
    """Of tokens whose logits start at multiples of 16 bytes; else of any."""
    n_experts = logits_TE.shape[1]
    if n_experts % _NEIGHBOURS or logits_TE.data_ptr() % 16:
        return _ANY
    return next((plan for plan in _PLANS if n_experts <= plan.max_experts), _ANY)
