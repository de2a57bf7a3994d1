"""The balance loss: one read of the logits forward, one read and one write backward, all in fp32.

Each sequence is cut into equal blocks of tokens, whose number depends on no GPU. A program sums its block's shares and
counts its choices; blocks are then summed in their order, and no float is added by an atomic: same inputs, same bits.

With score s, its sum S over experts, count n_e of a sequence's L tokens that chose expert e, and
c_e = weight · E/K · n_e/L · 1/L, the loss is Σ_e c_e · Σ_t s_e/S. Its gradient in a logit is
s_e (1 - s_e)/S · (c_e - Σ_j c_j s_j/S): all that the backward needs beside the logits is c.

Shapes: T tokens, E experts, K experts per token, G sequences, P blocks of all sequences.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel
from torch.autograd.function import once_differentiable

_PROGRAMS = 1024
"""At most, unless there are more sequences: at 64 registers a thread, an H100 runs all of them at once."""
_ELEMENTS = 2048
"""Of the logits that a program holds at a time, unless a token has more."""
_LEAST_WIDTH = 32
_MAX_EXPERTS = 4096
_CHOICES = 512
"""Counted at a time: those of 64 tokens with up to 8 experts, and no fewer than a program's threads."""
_BINS = 512
"""Experts whose choices are counted at a time: Triton's histogram takes registers for each."""
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fusion said: Triton 3.10 changes the default
_SUM_SIZES = {"ROWS": 128, "COLS": 32}
_SUM_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["top_k", "length", "block", "blocks"])
def _sum_shares_kernel(
    logits_ptr,
    expert_ptr,
    share_ptr,
    count_ptr,
    n_experts,
    top_k,
    length,
    block,
    blocks,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0)
    place = program % blocks * block
    first = (program // blocks).to(tl.int64) * length + place
    n_tokens = tl.minimum(block, length - place)
    out = program.to(tl.int64) * n_experts

    choice, offset = tl.arange(0, CHOICES), tl.arange(0, BINS)
    expert_ptr += first * top_k
    for lowest in range(0, n_experts, BINS):
        count = tl.zeros((BINS,), tl.int32)
        for done in range(0, n_tokens * top_k, CHOICES):
            inside = choice < n_tokens * top_k - done
            chosen = tl.load(expert_ptr + done + choice, mask=inside, other=0) - lowest
            count += tl.histogram(chosen, BINS, mask=inside & (chosen >= 0) & (chosen < BINS))
        tl.store(count_ptr + out + lowest + offset, count, mask=lowest + offset < n_experts)

    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    logits_ptr += first * n_experts
    for done in range(0, n_tokens, ROWS):
        left = row < n_tokens - done
        at = (done + row) * n_experts + column
        # What lies beyond the experts scores 0.
        score = tl.sigmoid(tl.load(logits_ptr + at, mask=left & (column < n_experts), other=float("-inf")))
        total += score * tl.where(left, 1 / tl.sum(score, 1, keep_dims=True), 0.0)
    share = tl.sum(total, 0, keep_dims=True)
    tl.store(share_ptr + out + column, share, mask=column < n_experts)


@triton.jit(do_not_specialize=["blocks"])
def _sum_blocks_kernel(
    share_ptr,
    count_ptr,
    coefficient_ptr,
    loss_ptr,
    n_experts,
    blocks,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    first = sequence * blocks * n_experts
    share = tl.zeros((ROWS, COLS), tl.float32)
    count = tl.zeros((ROWS, COLS), tl.int32)
    for done in range(0, blocks, ROWS):
        at = first + (done + row) * n_experts + column
        inside = (row < blocks - done) & (column < n_experts)
        share += tl.load(share_ptr + at, mask=inside, other=0.0)
        count += tl.load(count_ptr + at, mask=inside, other=0)
    expert = tl.program_id(1) * COLS + tl.arange(0, COLS)
    coefficient = tl.sum(count, 0).to(tl.float32) * scale
    tl.store(coefficient_ptr + sequence * n_experts + expert, coefficient, mask=expert < n_experts)
    loss = tl.sum(coefficient * tl.sum(share, 0), 0)
    tl.store(loss_ptr + sequence * tl.num_programs(1) + tl.program_id(1), loss)


@triton.jit(do_not_specialize=["length", "block", "blocks"])
def _balance_backward_kernel(
    dloss_ptr,
    logits_ptr,
    coefficient_ptr,
    dlogits_ptr,
    n_experts,
    length,
    block,
    blocks,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    place = program % blocks * block
    first = (sequence * length + place) * n_experts
    n_tokens = tl.minimum(block, length - place)

    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    coefficient = tl.load(coefficient_ptr + sequence * n_experts + column, mask=column < n_experts, other=0.0)
    dloss = tl.load(dloss_ptr)
    logits_ptr += first
    dlogits_ptr += first
    for done in range(0, n_tokens, ROWS):
        inside = (row < n_tokens - done) & (column < n_experts)
        at = (done + row) * n_experts + column
        score = tl.sigmoid(tl.load(logits_ptr + at, mask=inside, other=float("-inf")))
        one_over_sum = 1 / tl.sum(score, 1, keep_dims=True)
        mean = tl.sum(score * coefficient, 1, keep_dims=True) * one_over_sum
        dlogits = dloss * one_over_sum * (score * (1 - score)) * (coefficient - mean)
        tl.store(dlogits_ptr + at, dlogits, mask=inside)


def balance_loss(logits_TE: torch.Tensor, expert_TK: torch.Tensor, *, n_sequences: int, weight: float) -> torch.Tensor:
    """See `nmoe.kernels.reference.balance.balance_loss`. Autograd keeps the logits, and fp32 (G, E).

    Args:
        logits_TE: fp32; E ≤ 4096.
        expert_TK: int32; each token's K different experts, which is not checked. Fewer than 2^31 in all.
        n_sequences: G, a divisor of T.
        weight: of each sequence's loss.

    Raises:
        ShapeError: a shape, dtype or device is not as above.
    """
    _check(logits_TE, expert_TK, n_sequences)
    return _BalanceLoss.apply(logits_TE, expert_TK, n_sequences, weight)


def _check(logits_TE: torch.Tensor, expert_TK: torch.Tensor, n_sequences: int) -> None:
    fits = (
        logits_TE.dtype == torch.float32
        and expert_TK.dtype == torch.int32
        and logits_TE.dim() == expert_TK.dim() == 2
        and logits_TE.shape[0] == expert_TK.shape[0]
        and 1 <= expert_TK.shape[1] <= logits_TE.shape[1] <= _MAX_EXPERTS
        and expert_TK.numel() < 1 << 31
        and logits_TE.device == expert_TK.device
    )
    if not fits:
        raise ShapeError(
            f"expected logits (T, E) of torch.float32 and experts (T, K) of torch.int32 on one device, with 1 ≤ K ≤ E "
            f"≤ {_MAX_EXPERTS} and T·K < 2^31; found {tuple(logits_TE.shape)} of {logits_TE.dtype} on "
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
        length, sizes = n_tokens // n_sequences, _sizes(n_experts)
        block, blocks = _blocks(length, n_sequences, sizes["ROWS"])
        share_PE = logits_TE.new_empty(n_sequences * blocks, n_experts)
        count_PE = expert_TK.new_empty(n_sequences * blocks, n_experts)
        coefficient_GE = logits_TE.new_empty(n_sequences, n_experts)
        columns = triton.cdiv(n_experts, _SUM_SIZES["COLS"])
        loss_GN = logits_TE.new_empty(n_sequences, columns)
        with torch.cuda.device_of(logits_TE):
            _sum_shares_kernel[(n_sequences * blocks,)](
                logits_TE,
                expert_TK,
                share_PE,
                count_PE,
                n_experts,
                top_k,
                length,
                block,
                blocks,
                **sizes,
                **_counts(sizes["WIDTH"]),
                **_OPTIONS,
            )
            _sum_blocks_kernel[(n_sequences, columns)](
                share_PE,
                count_PE,
                coefficient_GE,
                loss_GN,
                n_experts,
                blocks,
                weight * n_experts / (top_k * length**2),
                **_SUM_SIZES,
                **_SUM_OPTIONS,
            )
        ctx.save_for_backward(logits_TE, coefficient_GE)
        return loss_GN.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_TE, coefficient_GE = ctx.saved_tensors
        dlogits_TE, (n_tokens, n_experts) = torch.empty_like(logits_TE), logits_TE.shape
        n_sequences = coefficient_GE.shape[0]
        length, sizes = n_tokens // n_sequences, _sizes(n_experts)
        block, blocks = _blocks(length, n_sequences, sizes["ROWS"])
        with torch.cuda.device_of(logits_TE):
            _balance_backward_kernel[(n_sequences * blocks,)](
                grads[0],
                logits_TE,
                coefficient_GE,
                dlogits_TE,
                n_experts,
                length,
                block,
                blocks,
                **sizes,
                **_OPTIONS,
            )
        return dlogits_TE, None, None, None


def _sizes(n_experts: int) -> dict[str, int]:
    """Of a program's tile."""
    width = max(_LEAST_WIDTH, triton.next_power_of_2(n_experts))
    return {"ROWS": max(1, _ELEMENTS // width), "WIDTH": width}


def _counts(width: int) -> dict[str, int]:
    return {"CHOICES": _CHOICES, "BINS": min(_BINS, width)}


def _blocks(length: int, n_sequences: int, rows: int) -> tuple[int, int]:
    """Tokens of a block, and blocks of a sequence: the last may be shorter, and none is empty."""
    block = rows * triton.cdiv(length, rows * max(1, _PROGRAMS // n_sequences))
    return block, triton.cdiv(length, block)


_POINTERS = {"expert_ptr": "*i32", "count_ptr": "*i32"}
_COUNTED = ("n_experts", "top_k", "length", "block", "blocks")


def _ahead(
    name: str,
    function: str,
    pointers: tuple[str, ...],
    numbers: dict[str, str],
    sizes: dict[str, int],
    options: dict[str, Any],
) -> TritonKernel:
    types = {pointer: _POINTERS.get(pointer, "*fp32") for pointer in pointers} | numbers
    return TritonKernel(
        name,
        __name__,
        function,
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=tuple(sizes.items()),
        aligned=(*pointers, "n_experts"),
        options=tuple(options.items()),
    )


def _ahead_rows(n_experts: int) -> tuple[TritonKernel, TritonKernel]:
    sizes, numbers = _sizes(n_experts), dict.fromkeys(_COUNTED, "i32")
    backward = {name: kind for name, kind in numbers.items() if name != "top_k"}
    return (
        _ahead(
            f"balance_sum_shares_{n_experts}",
            "_sum_shares_kernel",
            ("logits_ptr", "expert_ptr", "share_ptr", "count_ptr"),
            numbers,
            sizes | _counts(sizes["WIDTH"]),
            _OPTIONS,
        ),
        _ahead(
            f"balance_backward_{n_experts}",
            "_balance_backward_kernel",
            ("dloss_ptr", "logits_ptr", "coefficient_ptr", "dlogits_ptr"),
            backward,
            sizes,
            _OPTIONS,
        ),
    )


TRITON_KERNELS = (
    _ahead(
        "balance_sum_blocks",
        "_sum_blocks_kernel",
        ("share_ptr", "count_ptr", "coefficient_ptr", "loss_ptr"),
        {"n_experts": "i32", "blocks": "i32", "scale": "fp32"},
        _SUM_SIZES,
        _SUM_OPTIONS,
    ),
    *(kernel for n_experts in (64, 256, _MAX_EXPERTS) for kernel in _ahead_rows(n_experts)),
)
"""What is compiled ahead: for numbers of experts of multiples of 16."""
