"""The router's logits on Hopper, in one pass: a bf16 x times an fp32 weight that comes as three bf16 parts.

Deterministic: each logit is summed in one order, whatever stands beside it. The op takes no part in autograd graphs:
the router's backward is derived by hand.

Shapes: T tokens, D model width, E experts.
"""

import ctypes
from functools import cache

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap, tensor_map

_THREADS = 384
_TILE_TOKENS = 128
_STEP = 64
"""Columns of x a stage."""
_PARTS = 3
_SHARED_BYTES = 232_448
"""A block's most."""
_BARRIER_BYTES = 16
"""A stage."""
_MOST = 1 << 30
"""Tokens, columns or experts: tiles that reach beyond the end are counted in 32 bits."""


def _stage_bytes(tile_experts: int) -> int:
    return (_TILE_TOKENS + _PARTS * tile_experts) * _STEP * 2 + _BARRIER_BYTES


_STAGES = {tile_experts: _SHARED_BYTES // _stage_bytes(tile_experts) for tile_experts in (64, 128)}
_SOURCES = {
    tile_experts: CudaSource(
        f"router_product_{tile_experts}",
        "router_sm90.cu",
        "router_product",
        ("sm_90a",),
        (("TILE_N", tile_experts), ("STAGES", stages)),
    )
    for tile_experts, stages in _STAGES.items()
}
SOURCES = tuple(_SOURCES.values())
"""Every compile of this module."""

_KERNELS = {tile_experts: CudaKernel(source) for tile_experts, source in _SOURCES.items()}


class _RouterParams(ctypes.Structure):
    _fields_ = (
        ("x", TensorMap),
        ("weight", TensorMap),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n_tokens", "n_experts", "width", "n_tiles")),
        ("unused", ctypes.c_byte * 40),  # C++ rounds the size up to 64
    )


def router_product(x_TD: torch.Tensor, parts_E3D: torch.Tensor) -> torch.Tensor:
    """`x · (part 0 + part 1 + part 2)ᵀ`, summed in fp32 by the tensor cores: the first part and the others apart.

    Args:
        x_TD: bf16, contiguous, on a CUDA device of sm_90a, at a multiple of 16 bytes; D a multiple of 8, and not 0.
        parts_E3D: the same, on its device; `nmoe.kernels.native.split_cuda.split` of the weight gives it.

    Returns:
        (T, E) fp32.

    Raises:
        ShapeError: a tensor is not as described.
    """
    _check("x (T, D)", 2, x_TD)
    _check(f"weight parts (E, {_PARTS}, D)", 3, parts_E3D)
    n_tokens, width = x_TD.shape
    n_experts, n_parts, parts_width = parts_E3D.shape
    if (n_parts, parts_width) != (_PARTS, width) or parts_E3D.device != x_TD.device:
        raise ShapeError(
            f"expected weight parts (E, {_PARTS}, {width}) on {x_TD.device} for x {tuple(x_TD.shape)}, found "
            f"{tuple(parts_E3D.shape)} on {parts_E3D.device}: split the weight that belongs to x"
        )
    if width < 8 or width % 8:
        raise ShapeError(f"expected a width of a multiple of 8, found {width}: pad the model's width")
    if max(n_tokens, n_experts, width) >= _MOST:
        raise ShapeError(
            f"expected fewer than 2^30 tokens, columns and experts, found x {tuple(x_TD.shape)} and {n_experts} "
            "experts: split the tokens into smaller batches"
        )
    return _router_product_op(x_TD, parts_E3D)


def _check(expected: str, dims: int, found: torch.Tensor) -> None:
    if found.dtype != torch.bfloat16 or found.dim() != dims or not found.is_cuda or not found.is_contiguous():
        layout = "contiguous" if found.is_contiguous() else "strided"
        raise ShapeError(
            f"expected {expected}, contiguous torch.bfloat16 on a CUDA device; found {tuple(found.shape)}, {layout} "
            f"{found.dtype} on {found.device}: convert it, or set runtime.kernels = 'reference'"
        )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(x_TD: torch.Tensor, parts_E3D: torch.Tensor, logits_TE: torch.Tensor) -> None:
    """Fills `logits_TE`, which starts at a multiple of 8 bytes."""
    (n_tokens, n_experts), width = logits_TE.shape, x_TD.shape[1]
    if not logits_TE.numel():
        return
    tile_experts = 64 if n_experts <= 64 else 128
    n_tiles = -(-n_tokens // _TILE_TOKENS) * -(-n_experts // tile_experts)
    row = width * 2
    params = _RouterParams(
        x=tensor_map(x_TD, (width, n_tokens), (row,), (_STEP, _TILE_TOKENS), True),
        weight=tensor_map(parts_E3D, (width, _PARTS, n_experts), (row, _PARTS * row), (_STEP, 1, tile_experts), True),
        logits=logits_TE.data_ptr(),
        n_tokens=n_tokens,
        n_experts=n_experts,
        width=width,
        n_tiles=n_tiles,
    )
    shared_bytes = _STAGES[tile_experts] * _stage_bytes(tile_experts)
    with torch.cuda.device(x_TD.device):
        grid = (min(n_tiles, _processors(x_TD.device)), 1, 1)
        _KERNELS[tile_experts].launch(grid, _THREADS, shared_bytes, params)


def _router_product_fake(x_TD: torch.Tensor, parts_E3D: torch.Tensor) -> torch.Tensor:
    return x_TD.new_empty(x_TD.shape[0], parts_E3D.shape[0], dtype=torch.float32)


def _router_product_cuda(x_TD: torch.Tensor, parts_E3D: torch.Tensor) -> torch.Tensor:
    logits_TE = _router_product_fake(x_TD, parts_E3D)
    _launch(x_TD, parts_E3D, logits_TE)
    return logits_TE


_LIBRARY = torch.library.Library("nmoe", "FRAGMENT")
_LIBRARY.define("router_product(Tensor x, Tensor parts) -> Tensor")
_LIBRARY.impl("router_product", _router_product_cuda, "CUDA")
torch.library.register_fake("nmoe::router_product", _router_product_fake, lib=_LIBRARY)
_router_product_op = torch.ops.nmoe.router_product.default
