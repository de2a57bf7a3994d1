"""The router's share of its tokens' gradient, added to the others' in one pass over memory.

The sum over experts is short, so that time goes into reading one (T, D) matrix and writing another. One program owns a
whole output tile and sums it in one order, in fp32: same inputs, same bits. Only plain loads and `tl.dot` are used, so
that Triton's interpreter runs the same source.

Shapes: T tokens, D model width, E experts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel


class _Tile(NamedTuple):
    """An output tile of `rows` × `cols`, summed over `inner` experts a step; warps and pipeline stages of a program."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Of a launch."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "INNER": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": 128,  # two programs on a multiprocessor: one reads while the other writes
            "enable_fp_fusion": False,  # said, since Triton 3.10 changes the default
        }


_TILE = _Tile(128, 128, 64, 8, 2)
_INTERPRETED = _Tile(16, 64, 32, 1, 1)
"""Small, and different in each direction, so that small tensors have every kind of edge."""

_SIDE_LIMIT = 1 << 23
"""Within a tile, 32 bits count elements: 128 rows of two parts stay below 2^31."""


@triton.jit(do_not_specialize=["n_tokens"])
def _add_router_gradient_kernel(
    addend_ptr,
    parts_ptr,
    weight_ptr,
    out_ptr,
    n_tokens,
    width,
    n_experts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    # Neighbouring programs share tokens: what they read and write of (T, D) lies side by side.
    col_tiles = tl.cdiv(width, COLS)
    first_row = (tl.program_id(0) // col_tiles).to(tl.int64) * ROWS
    first_col = (tl.program_id(0) % col_tiles) * COLS
    at_T, at_D, at_E = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, INNER)
    row_inside, col_inside = at_T < n_tokens - first_row, at_D < width - first_col
    inside = row_inside[:, None] & col_inside[None, :]
    # 64 bits for a tile's corner, 32 within it: registers are what limits the tiles in flight.
    corner = first_row * width + first_col
    at_TD = at_T[:, None] * width + at_D[None, :]
    # Where the sum starts, rather than what is added in the end: kept beside it, it would take a third more registers.
    total = tl.load(addend_ptr + corner + at_TD, mask=inside, other=0.0).to(tl.float32)

    gradient_at = parts_ptr + first_row * (2 * n_experts)
    weight_at = weight_ptr + first_col
    for done in range(0, n_experts, INNER):
        left = at_E < n_experts - done
        at_TE, at_ED = at_T[:, None] * (2 * n_experts) + at_E[None, :], at_E[:, None] * width + at_D[None, :]
        gradient = tl.load(gradient_at + at_TE, mask=row_inside[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_at + at_ED, mask=left[:, None] & col_inside[None, :], other=0.0)
        total = tl.dot(gradient, weight, total)
        gradient_at += INNER
        weight_at += INNER * width
    tl.store(out_ptr + corner + at_TD, total.to(out_ptr.dtype.element_ty), mask=inside)


def add_router_gradient(addend_TD: torch.Tensor, parts_T2E: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """`addend + parts[:, 0] · weight`, summed in fp32 and rounded once: bf16 (T, D), in memory of its own.

    Args:
        addend_TD: bf16, contiguous.
        parts_T2E: bf16, contiguous: the logits' gradient as `split` gives it. The second part is not read: what it adds
            is below bf16's precision.
        weight_ED: bf16, contiguous.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as above.
    """
    for name, tensor, dims in (("addend", addend_TD, 2), ("parts", parts_T2E, 3), ("weight", weight_ED, 2)):
        if tensor.dtype != torch.bfloat16 or tensor.dim() != dims or not tensor.is_contiguous():
            raise ShapeError(
                f"expected {name} of {dims} dimensions and torch.bfloat16, contiguous; found {tuple(tensor.shape)} of "
                f"{tensor.dtype} and strides {tensor.stride()}: convert it, and call .contiguous() on it"
            )
    (n_tokens, width), n_experts = addend_TD.shape, weight_ED.shape[0]
    if parts_T2E.shape != (n_tokens, 2, n_experts) or weight_ED.shape[1] != width:
        raise ShapeError(
            f"expected parts (T, 2, E) and weight (E, D) for addend {tuple(addend_TD.shape)}; found "
            f"{tuple(parts_T2E.shape)} and {tuple(weight_ED.shape)}: give the gradient and the weight of its tokens' "
            "router"
        )
    if max(width, n_experts) >= _SIDE_LIMIT:
        raise ShapeError(f"expected fewer than 2^23 columns and experts, found {width} and {n_experts}: divide them")
    if not addend_TD.device == parts_T2E.device == weight_ED.device:
        raise ShapeError(
            f"expected all tensors on one device; found {addend_TD.device}, {parts_T2E.device} and "
            f"{weight_ED.device}: move them to one"
        )
    tile = _TILE if addend_TD.is_cuda else _INTERPRETED
    out_TD = torch.empty_like(addend_TD)
    programs = triton.cdiv(n_tokens, tile.rows) * triton.cdiv(width, tile.cols)
    if programs:
        with torch.cuda.device_of(addend_TD):
            _add_router_gradient_kernel[(programs,)](
                addend_TD, parts_T2E, weight_ED, out_TD, n_tokens, width, n_experts, **tile.options()
            )
    return out_TD


def _ahead(tile: _Tile) -> TritonKernel:
    options = tile.options()
    sizes = {key: options.pop(key) for key in ("ROWS", "COLS", "INNER")}
    pointers = ("addend_ptr", "parts_ptr", "weight_ptr", "out_ptr")
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("n_tokens", "width", "n_experts"), "i32")
    return TritonKernel(
        "add_router_gradient",
        __name__,
        "_add_router_gradient_kernel",
        ("sm_90a", "sm_100a"),
        tuple(types.items()),
        constants=tuple(sizes.items()),
        aligned=(*pointers, "width", "n_experts"),
        options=tuple(options.items()),
    )


TRITON_KERNELS = (_ahead(_TILE),)
"""What is compiled ahead: for widths and numbers of experts of multiples of 16."""
