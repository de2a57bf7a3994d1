"""Newton-Schulz in bf16 on Hopper and Blackwell, many matrices at a time.

Of an iteration's three products two are symmetric, X Xᵀ and its polynomial: only tiles on and under the diagonal are
computed, and each is stored at its mirrored place too, so that they cost half. The polynomial takes `a · I` along, so
that the third, polynomial times X, is a plain batched product, the library's. Each product is summed in fp32 in one
order and rounded once: same inputs, same bits.

Shapes: M the short side, N the long one; Q matrices.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from nmoe.kernels.arch import entry_for
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.newton_schulz import COEFFICIENTS, EPS
from nmoe.kernels.runtime.triton_aot import TritonKernel


class Tile(NamedTuple):
    """A square output tile of `side`, summed in steps of `inner`; warps of a program, and stages of its pipeline."""

    side: int
    inner: int
    num_warps: int
    num_stages: int


_TILES = {"sm_90a": Tile(128, 64, 4, 3), "sm_100a": Tile(128, 64, 8, 3)}
_INTERPRETED = Tile(16, 32, 1, 1)


@triton.jit(do_not_specialize=["n_tiles"])
def _symmetric_kernel(
    x_ptr,
    out_ptr,
    n_tiles,
    m,
    n,
    product_factor,
    own_factor,
    identity_factor,
    TALL: tl.constexpr,
    OWN: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
):
    """`product_factor · X Xᵀ`, and if OWN, `+ own_factor · X + identity_factor · I`; X, (m, n), is then symmetric.

    If TALL, what lies in memory is its transpose.
    """
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    tile = tl.program_id(0) % n_tiles
    # Tiles are numbered row by row: row r begins at r (r + 1) / 2. The root is right but for its rounding.
    row_tile = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    row_tile += ((row_tile + 1) * (row_tile + 2) // 2 <= tile).to(tl.int32)
    row_tile -= (row_tile * (row_tile + 1) // 2 > tile).to(tl.int32)
    col_tile = tile - row_tile * (row_tile + 1) // 2
    row = row_tile * SIDE + tl.arange(0, SIDE)
    col = col_tile * SIDE + tl.arange(0, SIDE)
    at = tl.arange(0, INNER)

    x_at = x_ptr + matrix * m * n
    if TALL:
        a_at = x_at + row[:, None] + at[None, :] * m
        b_at = x_at + col[None, :] + at[:, None] * m
    else:
        a_at = x_at + row[:, None] * n + at[None, :]
        b_at = x_at + col[None, :] * n + at[:, None]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for done in range(0, n, INNER):
        inside = at < n - done
        a = tl.load(a_at, mask=(row < m)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (col < m)[None, :], other=0.0)
        total = tl.dot(a, b, total)
        a_at += INNER * m if TALL else INNER
        b_at += INNER * m if TALL else INNER

    total *= product_factor
    within = (row < m)[:, None] & (col < m)[None, :]
    if OWN:
        own = tl.load(x_at + row[:, None] * m + col[None, :], mask=within, other=0.0).to(tl.float32)
        total += own * own_factor
        total += tl.where(row[:, None] == col[None, :], identity_factor, 0.0)
    rounded = total.to(tl.bfloat16)
    out_at = out_ptr + matrix * m * m
    tl.store(out_at + row[:, None] * m + col[None, :], rounded, mask=within)
    if row_tile != col_tile:
        mirrored = (col < m)[:, None] & (row < m)[None, :]
        tl.store(out_at + col[:, None] * m + row[None, :], tl.trans(rounded), mask=mirrored)


def newton_schulz(matrices: torch.Tensor, *, steps: int) -> torch.Tensor:
    """See `nmoe.kernels.reference.newton_schulz.newton_schulz`: bf16, contiguous, fewer than 2^31 elements a matrix.

    Beside matrices and result it takes memory of one more tensor of their size and of two of (Q, M, M).

    Raises:
        ShapeError: another dtype or layout.
        UnsupportedArchError: there are no tiles for the device.
    """
    if matrices.dtype != torch.bfloat16 or matrices.dim() < 2 or not matrices.is_contiguous():
        raise ShapeError(
            f"expected matrices (…, M, N), contiguous torch.bfloat16; found {tuple(matrices.shape)} of "
            f"{matrices.dtype}, strides {matrices.stride()}: convert them, or set runtime.kernels = 'reference'"
        )
    rows, cols = matrices.shape[-2:]
    if rows * cols >= 1 << 31:
        raise ShapeError(f"expected matrices of fewer than 2^31 elements, found {rows} x {cols}: divide them")
    tall, m, n = rows > cols, min(rows, cols), max(rows, cols)
    tile = _tile(matrices.device)
    given = matrices.view(-1, rows, cols)
    x, spare = torch.empty_like(given), torch.empty_like(given)
    if matrices.numel() == 0:
        return x.view(matrices.shape)
    norm = torch.linalg.vector_norm(given, dim=(1, 2), keepdim=True, dtype=torch.float32)
    torch.div(given, norm + EPS, out=x)
    gram, polynomial = x.new_empty(len(x), m, m), x.new_empty(len(x), m, m)
    a, b, c = COEFFICIENTS
    with torch.cuda.device_of(matrices):
        for _ in range(steps):
            _symmetric(x, gram, m, n, (1.0, 0.0, 0.0), tile, tall=tall, own=False)
            _symmetric(gram, polynomial, m, m, (c, b, a), tile, tall=False, own=True)
            torch.bmm(x, polynomial, out=spare) if tall else torch.bmm(polynomial, x, out=spare)
            x, spare = spare, x
    return x.view(matrices.shape)


def _symmetric(
    x: torch.Tensor,
    out: torch.Tensor,
    m: int,
    n: int,
    factors: tuple[float, float, float],
    tile: Tile,
    *,
    tall: bool,
    own: bool,
) -> None:
    row_tiles = triton.cdiv(m, tile.side)
    n_tiles = row_tiles * (row_tiles + 1) // 2
    _symmetric_kernel[(len(x) * n_tiles,)](x, out, n_tiles, m, n, *factors, TALL=tall, OWN=own, **_options(tile))


@functools.cache
def _tile(device: torch.device) -> Tile:
    return _INTERPRETED if device.type == "cpu" else entry_for(device, _TILES, "the Triton Newton-Schulz")


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "SIDE": tile.side,
        "INNER": tile.inner,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,  # said, since Triton 3.10 changes the default
    }


_TYPES = {
    "x_ptr": "*bf16",
    "out_ptr": "*bf16",
    "n_tiles": "i32",
    "m": "i32",
    "n": "i32",
    "product_factor": "fp32",
    "own_factor": "fp32",
    "identity_factor": "fp32",
}


def _ahead(arch: str, name: str, *, tall: bool, own: bool) -> TritonKernel:
    options = _options(_TILES[arch])
    sizes = {key: options.pop(key) for key in ("SIDE", "INNER")}
    return TritonKernel(
        f"newton_schulz_{name}_{arch}",
        __name__,
        "_symmetric_kernel",
        (arch,),
        tuple(_TYPES.items()),
        constants=(("TALL", tall), ("OWN", own), *sizes.items()),
        aligned=("x_ptr", "out_ptr", "m", "n"),
        options=tuple(options.items()),
    )


TRITON_KERNELS = tuple(
    kernel
    for arch in _TILES
    for kernel in (
        _ahead(arch, "gram_wide", tall=False, own=False),
        _ahead(arch, "gram_tall", tall=True, own=False),
        _ahead(arch, "polynomial", tall=False, own=True),
    )
)
"""What is compiled ahead: for sides of multiples of 16."""
