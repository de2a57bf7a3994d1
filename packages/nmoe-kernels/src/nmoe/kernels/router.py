"""The router's scores: an fp32 product at the speed of bf16 tensor cores.

A bf16 x times an fp32 weight is a sum of three products of bf16 numbers, for an fp32 significand (24 bits) is three of
bf16's (8 bits) on end. Each product is exact in fp32, which is how the tensor cores accumulate.

Shapes: T tokens, D model width, E experts.
"""

from functools import cache
from typing import Any, Literal

import torch
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import deliver
from nmoe.kernels.reference.matmul import mm_wide
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
    if x_TD.dim() != 2 or weight_ED.dim() != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise ShapeError(
            f"expected x (T, D) and weight (E, D), found {tuple(x_TD.shape)} and {tuple(weight_ED.shape)}: give both "
            "the model's width"
        )
    return _RouterLogits.apply(x_TD, weight_ED)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD)
        ctx.weight = weight_ED  # the very parameter: its main_grad is looked up when the gradient is there
        if not _splits(x_TD, weight_ED):
            return x_TD.to(weight_ED.dtype) @ weight_ED.t()
        return _product(x_TD.contiguous(), _split(weight_ED, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        (dlogits_TE,), (x_TD,), weight_ED = grads, ctx.saved_tensors, ctx.weight
        wants_x, wants_weight = ctx.needs_input_grad
        dx_TD = dweight_ED = None
        if _splits(x_TD, weight_ED):
            parts_T2E = _split(dlogits_TE, 2)  # the upper 8 bits and the next 8: dweight takes both
            if wants_x:
                dx_TD = parts_T2E[:, 0] @ weight_ED.to(x_TD.dtype)
            if wants_weight:
                dweight_ED = mm_wide(parts_T2E.flatten(1).t(), x_TD).unflatten(0, (2, -1)).sum(0)
        else:
            if wants_x:
                dx_TD = (dlogits_TE @ weight_ED).to(x_TD.dtype)
            if wants_weight:
                dweight_ED = dlogits_TE.t() @ x_TD.to(weight_ED.dtype)
        return dx_TD, None if dweight_ED is None else deliver(weight_ED, dweight_ED)


def _splits(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> bool:
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and weight_ED.dtype == torch.float32


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
        _add_product(logits_TE, x_TD, part)
    return logits_TE


def _add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


def _in_one_pass(x_TD: torch.Tensor) -> bool:
    """Whether `router_product` takes a contiguous x: it is for Hopper, and TMA reads rows of multiples of 16 bytes."""
    width = x_TD.shape[1]
    return width > 0 and width % 8 == 0 and x_TD.data_ptr() % 16 == 0 and _arch(x_TD.device) == "sm_90a"


@cache
def _arch(device: torch.device) -> str:
    return detect_arch(device)
