"""The router's scores: an fp32 product at the speed of bf16 tensor cores.

A bf16 x times an fp32 weight is a sum of three products of bf16 numbers, for an fp32 significand (24 bits) is three of
bf16's (8 bits) on end. Each product is exact in fp32, which is how the tensor cores accumulate.

Shapes: T tokens, D model width, E experts.
"""

from functools import cache
from typing import Any, Literal

import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.reference.matmul import mm_into, mm_wide
from torch.autograd.function import once_differentiable


def router_logits(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """`x · weightᵀ` in the weight's precision, fp32 or wider; differentiable in both.

    Args:
        x_TD: bf16, or the weight's dtype.
        weight_ED: fp32 (fp64 for gradient checks).

    Returns:
        (T, E) of the weight's dtype.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    return router_logits_and_tokens(x_TD, weight_ED)[0]


def router_logits_and_tokens(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `router_logits`, and x again, for all that reads it beside the router: experts, and shared experts.

    The gradient that comes back through that x is where the sum of the router's own starts, which is rounded once.
    Autograd alone would round both, and take two passes more over (T, D) to add one to the other.

    Returns:
        The logits, and a view of x: writing to it in place is refused, for the router's gradient needs it as it is.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    if x_TD.dim() != 2 or weight_ED.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise ShapeError(
            f"expected x (T, D) and weight (E, D), found {tuple(x_TD.shape)} and {tuple(weight_ED.shape)}: give both "
            "the model's width"
        )
    logits_TE, again_TD = _RouterLogits.apply(x_TD, weight_ED)
    # The function's own would want a gradient for the weight's sake.
    return logits_TE, again_TD if x_TD.requires_grad else x_TD


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x_TD)
        ctx.set_materialize_grads(False)
        ctx.weight = weight_ED  # the very parameter: its main_grad is looked up when the gradient is there
        if not _splits(x_TD, weight_ED):
            return x_TD.to(weight_ED.dtype) @ weight_ED.t(), x_TD
        return _product(x_TD.contiguous(), _split(weight_ED, 3)), x_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (dlogits_TE, addend_TD), (x_TD,), weight_ED = grads, ctx.saved_tensors, ctx.weight
        wants_x, wants_weight = ctx.needs_input_grad
        if dlogits_TE is None:
            return addend_TD, None
        dx_TD = dweight_ED = None
        if _splits(x_TD, weight_ED):
            parts_T2E = _split(dlogits_TE, 2)  # the upper 8 bits and the next 8: dweight takes both
            if wants_x:
                dx_TD = _gradient(addend_TD, parts_T2E, weight_ED.to(x_TD.dtype))
            if wants_weight:
                dweight_ED = mm_wide(parts_T2E.flatten(1).t(), x_TD).unflatten(0, (2, -1)).sum(0)
        else:
            if wants_x:
                dx_TD = dlogits_TE @ weight_ED
                dx_TD = (dx_TD if addend_TD is None else dx_TD.add_(addend_TD)).to(x_TD.dtype)
            if wants_weight:
                dweight_ED = dlogits_TE.t() @ x_TD.to(weight_ED.dtype)
        return dx_TD, None if dweight_ED is None else deliver(weight_ED, dweight_ED)


def _splits(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> bool:
    """Whether the product is made of bf16 parts: on the arches that the kernels for it are written for."""
    narrow = x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32
    return narrow and _arch(x_TD.device) in NATIVE_ARCHES


def _split(wide_RN: torch.Tensor, parts: Literal[2, 3]) -> torch.Tensor:
    """(R, parts, N) in bf16: three sum to `wide`, exactly."""
    from nmoe.kernels.native.split_cuda import split

    return split(wide_RN.contiguous(), parts)


def _product(x_TD: torch.Tensor, parts_E3D: torch.Tensor) -> torch.Tensor:
    """`x · (Σ parts)ᵀ` in fp32: in one pass where there is a kernel for it, elsewhere by cuBLAS, part by part."""
    if _in_one_pass(x_TD):
        from nmoe.kernels.native.router_cuda import router_product

        return router_product(x_TD, parts_E3D)
    first, *others = (part_ED.t() for part_ED in parts_E3D.unbind(1))
    logits_TE = mm_wide(x_TD, first)
    for part in others:
        mm_into(logits_TE, x_TD, part, add=True)
    return logits_TE


def _gradient(addend_TD: torch.Tensor | None, parts_T2E: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """`addend + parts[:, 0] · weight`, rounded once."""
    if addend_TD is None:
        return parts_T2E[:, 0] @ weight_ED
    return _added_to(addend_TD.contiguous(), parts_T2E, weight_ED.contiguous())


def _added_to(addend_TD: torch.Tensor, parts_T2E: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    from nmoe.kernels.native.router_triton import add_router_gradient

    return add_router_gradient(addend_TD, parts_T2E, weight_ED)


def _in_one_pass(x_TD: torch.Tensor) -> bool:
    """Whether `router_product` takes a contiguous x: it is for Hopper, and TMA reads rows of multiples of 16 bytes."""
    width = x_TD.shape[1]
    return width > 0 and width % 8 == 0 and x_TD.data_ptr() % 16 == 0 and _arch(x_TD.device) == "sm_90a"


@cache
def _arch(device: torch.device) -> str:
    return detect_arch(device)
