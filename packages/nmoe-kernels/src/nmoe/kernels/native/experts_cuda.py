"""The routed experts of one rank on Hopper: six grouped products and two combines, with a hand-derived backward.

Forward: gather, up projection and SwiGLU in one kernel; down projection and gates in one; a sum by token. Kept for the
backward: x, the pre-activation and the indices. Nothing is recomputed but the activation, inside its gradient's kernel.

Shapes: T tokens, D model width, F expert width, e experts, K experts per token, R = T·K rows in expert order.
"""

from collections.abc import Iterable
from typing import Any

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import accumulator_of, claim
from nmoe.kernels.native import grouped_gemm_cuda as gemm
from nmoe.kernels.native.combine_cuda import combine, combine_backward
from nmoe.kernels.native.routing_cuda import RowIndex
from torch.autograd.function import once_differentiable

_ALIGNED = 8
"""bf16 values in 16 bytes: TMA's unit."""


def experts(
    x_TD: torch.Tensor, index: RowIndex, gate_TK: torch.Tensor, w13_e2FD: torch.Tensor, w2_eDF: torch.Tensor
) -> torch.Tensor:
    """`Σ_k gate[t, k] · expert_{expert[t, k]}(x[t])`: products summed in fp32, a token's rows in slot order.

    Bitwise the same from run to run, forward and backward. A weight with a `main_grad` gets its gradient there, not
    rounded, whichever gradients autograd is asked for; under `torch.compile` it has none and gets a bf16 gradient.

    Args:
        x_TD: bf16, contiguous; D a multiple of 8.
        index: the tokens' rows in expert order (`nmoe.kernels.native.routing_cuda.index_rows`).
        gate_TK: fp32 weights.
        w13_e2FD: bf16 gate and up projections, contiguous; F a multiple of 8.
        w2_eDF: bf16 down projections, contiguous.

    Returns:
        (T, D) bf16.

    Raises:
        ShapeError: a tensor is not as described; the message says how to mend it.
    """
    _check(x_TD, index, gate_TK, w13_e2FD, w2_eDF)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gate_TK, w13_e2FD, w2_eDF))
    return _forward_op(x_TD, *index, gate_TK, w13_e2FD, w2_eDF, training)[0]


def _check(
    x_TD: torch.Tensor, index: RowIndex, gate_TK: torch.Tensor, w13_e2FD: torch.Tensor, w2_eDF: torch.Tensor
) -> None:
    wanted = {"x (T, D)": (x_TD, 2), "w13 (e, 2, F, D)": (w13_e2FD, 4), "w2 (e, D, F)": (w2_eDF, 3)}
    for name, (tensor, dims) in wanted.items():
        if tensor.dtype != torch.bfloat16 or tensor.dim() != dims or not tensor.is_cuda or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise ShapeError(
                f"expected {name}, contiguous torch.bfloat16 on a CUDA device; found {tuple(tensor.shape)}, {layout} "
                f"{tensor.dtype} on {tensor.device}: convert it, or set runtime.kernels = 'reference'"
            )
    n_experts, two, hidden, width = w13_e2FD.shape
    if two != 2 or x_TD.shape[1] != width or w2_eDF.shape != (n_experts, width, hidden):
        raise ShapeError(
            "expected x (T, D), w13 (e, 2, F, D), w2 (e, D, F); "
            f"found {tuple(x_TD.shape)}, {tuple(w13_e2FD.shape)}, {tuple(w2_eDF.shape)}: use the same widths"
        )
    if width % _ALIGNED or hidden % _ALIGNED or not (width and hidden and n_experts):
        raise ShapeError(
            f"expected experts, and widths of multiples of {_ALIGNED}, found e = {n_experts}, D = {width} and "
            f"F = {hidden}: round them up, or set "
            "runtime.kernels = 'reference'"
        )
    if index.offset_E.shape != (n_experts + 1,):
        raise ShapeError(
            f"expected an index of {n_experts} experts, found one of {index.offset_E.shape[0] - 1}: index the rows for "
            "the experts of these weights"
        )
    if index.row_TK.shape != gate_TK.shape or gate_TK.shape[0] != x_TD.shape[0] or gate_TK.dtype != torch.float32:
        raise ShapeError(
            f"expected rows and fp32 gates (T, K) with T = {x_TD.shape[0]}; found {tuple(index.row_TK.shape)} and "
            f"{tuple(gate_TK.shape)} of {gate_TK.dtype}: give the gates that came with the index"
        )
    devices = {tensor.device for tensor in (x_TD, gate_TK, w13_e2FD, w2_eDF, *index)}
    if len(devices) > 1:
        raise ShapeError(f"expected all tensors on {x_TD.device}, found {sorted(map(str, devices))}: move them there")
    if x_TD.numel() >= 1 << 31 or gate_TK.numel() * hidden >= 1 << 34:
        raise ShapeError(
            f"expected T·D < 2^31 and T·K·F < 2^34, found T·D = {x_TD.numel()} and T·K·F = {gate_TK.numel() * hidden}: "
            "split the tokens into smaller batches"
        )


# An op takes an index as its tensors one by one, in the order of RowIndex: its schema knows no tuple of them.


def _forward_cuda(x_TD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, gate_TK, w13_e2FD, w2_eDF, training = arguments
    index = RowIndex(*tensors)
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD), x_TD.new_empty(0, 2 * w2_eDF.shape[2])
    with torch.cuda.device(x_TD.device):
        activation_RF, pre_R2F = gemm.up(aligned(x_TD), index, w13_e2FD, keep_pre=training)
        y_RD = gemm.down(activation_RF, index, gate_TK.contiguous(), w2_eDF)
        return combine(y_RD, index.row_TK), pre_R2F


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and at a multiple of 16 bytes, as copies of gathered rows take it: itself in all but odd cases."""
    tensor = tensor.contiguous()  # autograd may hand an expanded one
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _forward_fake(x_TD: torch.Tensor, order_R: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, w2_eDF, training = arguments
    return torch.empty_like(x_TD), x_TD.new_empty(order_R.shape[0] if training else 0, 2 * w2_eDF.shape[2])


def _backward_cuda(dout_TD: torch.Tensor, x_TD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *tensors, gate_TK, pre_R2F, w13_e2FD, w2_eDF, dw13_e2FD, dw2_eDF, add13, add2 = arguments
    index = RowIndex(*tensors)
    if x_TD.shape[0] == 0:
        for into, add in ((dw13_e2FD, add13), (dw2_eDF, add2)):
            if into is not None and not add:
                into.zero_()
        return torch.empty_like(x_TD), gate_TK.new_empty(gate_TK.shape)
    x_TD, dout_TD = aligned(x_TD), aligned(dout_TD)
    with torch.cuda.device(x_TD.device):
        gated_RF, dpre_R2F, partial_NR = gemm.dgrad_activation(dout_TD, index, gate_TK.contiguous(), w2_eDF, pre_R2F)
        if dw2_eDF is not None:
            gemm.wgrad_down(dout_TD, gated_RF, index, dw2_eDF, add=add2)
        del gated_RF
        if dw13_e2FD is not None:
            gemm.wgrad_up(dpre_R2F, x_TD, index, dw13_e2FD, add=add13)
        return combine_backward(gemm.dgrad_input(dpre_R2F, index, w13_e2FD), index.row_TK, partial_NR)


def _backward_fake(dout_TD: torch.Tensor, x_TD: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    gate_TK = arguments[len(RowIndex._fields)]
    return torch.empty_like(x_TD), gate_TK.new_empty(gate_TK.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *kept, w13_e2FD, w2_eDF, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, output[1])
    ctx.weights = (w13_e2FD, w2_eDF)  # the very parameters: their main_grad is looked up when the gradient is there


@once_differentiable
def _gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    none = (None,) * len(RowIndex._fields)
    dout_TD = grads[0]
    if dout_TD is None:
        return None, *none, None, None, None, None
    check_accumulators(ctx.weights)  # of both, before either counts as written
    into, add, rounded = zip(*(gradient_target(weight) for weight in ctx.weights), strict=True)
    dx_TD, dgate_TK = _backward_op(dout_TD, *ctx.saved_tensors, *ctx.weights, *into, *add)
    dw13, dw2 = (
        target.to(weight.dtype) if target is not None and wanted else None
        for target, weight, wanted in zip(into, ctx.weights, rounded, strict=True)
    )
    return dx_TD, *none, dgate_TK, dw13, dw2, None


def gradient_target(weight: torch.Tensor) -> tuple[torch.Tensor | None, bool, bool]:
    """Where a weight's gradient goes, whether it is added to what is there, and whether autograd wants it rounded."""
    if not weight.requires_grad:
        return None, False, False
    claimed = claim(weight)
    if claimed is None:
        return torch.empty_like(weight, dtype=torch.float32), False, True
    return *claimed, False


def check_accumulators(weights: Iterable[torch.Tensor]) -> None:
    """The grouped weight gradients can write to the weights' `main_grad`, where there is one.

    Raises:
        ShapeError: they cannot.
    """
    for weight in weights:
        into = accumulator_of(weight) if weight.requires_grad else None
        if into is not None and (into.dtype != torch.float32 or not into.is_contiguous() or into.storage_offset() % 4):
            raise ShapeError(
                "expected a contiguous torch.float32 main_grad that starts at a multiple of 16 bytes, found "
                f"{into.dtype} with strides {into.stride()} from element {into.storage_offset()} of its storage: "
                "allocate it with torch.empty_like(weight, dtype=torch.float32)"
            )


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_INDEX = "Tensor order, Tensor token, Tensor row, Tensor offset, Tensor schedule, Tensor gate"
_LIBRARY.define(f"experts(Tensor x, {_INDEX}, Tensor w13, Tensor w2, bool training) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"experts_backward(Tensor dout, Tensor x, {_INDEX}, Tensor pre, Tensor w13, Tensor w2, Tensor(a!)? dw13, "
    "Tensor(b!)? dw2, bool add13, bool add2) -> (Tensor, Tensor)"
)
_LIBRARY.impl("experts", _forward_cuda, "CUDA")
_LIBRARY.impl("experts_backward", _backward_cuda, "CUDA")
torch.library.register_fake("nmoe::experts", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("nmoe::experts_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("nmoe::experts", _gradient, setup_context=_keep_for_backward, lib=_LIBRARY)
_forward_op = torch.ops.nmoe.experts.default
_backward_op = torch.ops.nmoe.experts_backward.default
