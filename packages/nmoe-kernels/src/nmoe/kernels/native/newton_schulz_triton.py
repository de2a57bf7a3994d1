"""Newton-Schulz in bf16 on Hopper and Blackwell, many matrices at a time.

Of an iteration's three products two are symmetric, X Xᵀ and its polynomial: only tiles on and under the diagonal are
computed, and each is stored at its mirrored place too, so that they cost half. The polynomial takes `a · I` along, so
that the third, polynomial times X, is a plain batched product, the library's. Each product is summed in fp32 in one
order and rounded once: same inputs, same bits.

No pass divides by the norm f: of the first iteration, X Xᵀ is divided by f², and the polynomial by f, before they are
rounded. A kernel sums each matrix's squares by parts, and whoever needs f adds these up.

Whole tiles of wide matrices are read and written by tensor descriptors (TMA), which is faster; all others by pointers.

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
from triton.tools.tensor_descriptor import TensorDescriptor

_PARTS = 32
"""That a matrix's squares are summed by."""
_SQUARES_BLOCK = 2048
_SQUARES_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Tile(NamedTuple):
    """A square output tile of `side`, summed in steps of `inner`; warps of a program, and stages of its pipeline."""

    side: int
    inner: int
    num_warps: int
    num_stages: int


_TILES = {"sm_90a": Tile(128, 64, 4, 3), "sm_100a": Tile(128, 64, 8, 3)}
_INTERPRETED = Tile(16, 32, 1, 1)


@triton.jit
def _squares_kernel(x_ptr, squares_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the squares of one part of a matrix: whole blocks, so that loads are of 16 bytes."""
    matrix, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    whole = tl.full((), size, tl.int64)  # `size` may be 1, which Triton takes for a constant
    blocks = tl.cdiv(tl.cdiv(whole, BLOCK), PARTS)
    x_ptr += matrix * whole
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(part * blocks, tl.minimum((part + 1) * blocks, tl.cdiv(whole, BLOCK))):
        at = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < whole, other=0.0).to(tl.float32)
        total += x * x
    tl.store(squares_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _over_norm(total, squares_ptr, matrix, eps, POWER: tl.constexpr, PARTS: tl.constexpr):
    """Divided by the matrix's norm to a power."""
    if POWER > 0:
        squares = tl.load(squares_ptr + matrix * PARTS + tl.arange(0, PARTS))
        inverse = 1 / (tl.sqrt_rn(tl.sum(squares, 0)) + eps)
        for _ in tl.static_range(POWER):
            total *= inverse
    return total


@triton.jit
def _place(tile):
    """Row and column of a tile. They are numbered row by row: row r begins at r (r + 1) / 2."""
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # right but for the root's rounding
    row += ((row + 1) * (row + 2) // 2 <= tile).to(tl.int32)
    row -= (row * (row + 1) // 2 > tile).to(tl.int32)
    return row, tile - row * (row + 1) // 2


@triton.jit(do_not_specialize=["n_tiles"])
def _symmetric_kernel(
    x_ptr,
    out_ptr,
    squares_ptr,
    n_tiles,
    m,
    n,
    product_factor,
    own_factor,
    identity_factor,
    eps,
    TALL: tl.constexpr,
    OWN: tl.constexpr,
    POWER: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`product_factor · X Xᵀ`, and if OWN, `+ own_factor · X + identity_factor · I`; X, (m, n), is then symmetric.

    If TALL, what lies in memory is its transpose. The result is divided by the norm to the POWER.
    """
    matrix = (tl.program_id(0) // n_tiles).to(tl.int64)
    row_tile, col_tile = _place(tl.program_id(0) % n_tiles)
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
    total = _over_norm(total, squares_ptr, matrix, eps, POWER, PARTS)
    rounded = total.to(tl.bfloat16)
    out_at = out_ptr + matrix * m * m
    tl.store(out_at + row[:, None] * m + col[None, :], rounded, mask=within)
    if row_tile != col_tile:
        mirrored = (col < m)[:, None] & (row < m)[None, :]
        tl.store(out_at + col[:, None] * m + row[None, :], tl.trans(rounded), mask=mirrored)


@triton.jit(do_not_specialize=["n_tiles"])
def _symmetric_tma_kernel(
    x_desc,
    own_desc,
    out_desc,
    squares_ptr,
    n_tiles,
    m,
    n,
    product_factor,
    own_factor,
    identity_factor,
    eps,
    OWN: tl.constexpr,
    POWER: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """As `_symmetric_kernel`, of matrices (Q · m, n) one after another, whose sides are multiples of the tile's."""
    matrix = tl.program_id(0) // n_tiles
    row_tile, col_tile = _place(tl.program_id(0) % n_tiles)
    row, col = matrix * m + row_tile * SIDE, matrix * m + col_tile * SIDE
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for done in range(0, n, INNER):
        a = x_desc.load([row, done])
        b = x_desc.load([col, done])
        total = tl.dot(a, b.T, total)
    total *= product_factor
    if OWN:
        total += own_desc.load([row, col_tile * SIDE]).to(tl.float32) * own_factor
        at = tl.arange(0, SIDE)
        total += tl.where(row_tile * SIDE + at[:, None] == col_tile * SIDE + at[None, :], identity_factor, 0.0)
    rounded = _over_norm(total, squares_ptr, matrix, eps, POWER, PARTS).to(tl.bfloat16)
    out_desc.store([row, col_tile * SIDE], rounded)
    if row_tile != col_tile:
        out_desc.store([col, row_tile * SIDE], tl.trans(rounded))


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
    if matrices.numel() == 0:
        return torch.empty_like(matrices)
    tall, m = rows > cols, min(rows, cols)
    tile = _tile(matrices.device)
    x = matrices.view(-1, rows, cols)
    spares = torch.empty_like(x), torch.empty_like(x)
    gram, polynomial = x.new_empty(len(x), m, m), x.new_empty(len(x), m, m)
    a, b, c = COEFFICIENTS
    with torch.cuda.device_of(matrices):
        squares = _squares(x)
        for step in range(steps):
            first, out = step == 0, spares[step % 2]
            _symmetric(x, gram, squares, (1.0, 0.0, 0.0), tile, tall=tall, own=False, power=2 if first else 0)
            _symmetric(gram, polynomial, squares, (c, b, a), tile, tall=False, own=True, power=1 if first else 0)
            x = torch.bmm(x, polynomial, out=out) if tall else torch.bmm(polynomial, x, out=out)
    return x.view(matrices.shape)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Sums of each matrix's parts, fp32."""
    squares = x.new_empty(len(x), _PARTS, dtype=torch.float32)
    sizes = {"PARTS": _PARTS, "BLOCK": _SQUARES_BLOCK}
    _squares_kernel[(squares.numel(),)](x, squares, x[0].numel(), **sizes, **_SQUARES_OPTIONS)
    return squares


def _symmetric(
    x: torch.Tensor,
    out: torch.Tensor,
    squares: torch.Tensor,
    factors: tuple[float, float, float],
    tile: Tile,
    *,
    tall: bool,
    own: bool,
    power: int,
) -> None:
    m, n = x.shape[:0:-1] if tall else x.shape[1:]
    row_tiles = triton.cdiv(m, tile.side)
    n_tiles = row_tiles * (row_tiles + 1) // 2
    grid, numbers = (len(x) * n_tiles,), (squares, n_tiles, m, n, *factors, EPS)
    options = {"OWN": own, "POWER": power, **_options(tile)}
    if tall or m % tile.side or n % tile.inner or x.data_ptr() % 16:
        _symmetric_kernel[grid](x, out, *numbers, TALL=tall, **options)
        return
    whole = [tile.side, tile.side]
    own_desc = _describe(x if own else out, whole)
    _symmetric_tma_kernel[grid](
        _describe(x, [tile.side, tile.inner]), own_desc, _describe(out, whole), *numbers, **options
    )


def _describe(matrices: torch.Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrices.view(-1, matrices.shape[-1]), box)


@functools.cache
def _tile(device: torch.device) -> Tile:
    return _INTERPRETED if device.type == "cpu" else entry_for(device, _TILES, "the Triton Newton-Schulz")


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "SIDE": tile.side,
        "INNER": tile.inner,
        "PARTS": _PARTS,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,  # said, since Triton 3.10 changes the default
    }


_NUMBERS = {
    "squares_ptr": "*fp32",
    **dict.fromkeys(("n_tiles", "m", "n"), "i32"),
    **dict.fromkeys(("product_factor", "own_factor", "identity_factor", "eps"), "fp32"),
}


def _ahead(arch: str, name: str, *, own: bool, power: int, tall: bool = False, tma: bool = False) -> TritonKernel:
    tile = _TILES[arch]
    options = _options(tile)
    sizes = {"OWN": own, "POWER": power} | {key: options.pop(key) for key in ("SIDE", "INNER", "PARTS")}
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    if tma:
        whole = f"tensordesc<bf16[{tile.side}, {tile.side}]>"
        types = {"x_desc": f"tensordesc<bf16[{tile.side}, {tile.inner}]>", "own_desc": whole, "out_desc": whole}
    types |= _NUMBERS
    return TritonKernel(
        f"newton_schulz_{name}{'_tma' * tma}{'_first' * (power > 0)}_{arch}",
        __name__,
        "_symmetric_tma_kernel" if tma else "_symmetric_kernel",
        (arch,),
        tuple(types.items()),
        constants=tuple((sizes if tma else {"TALL": tall} | sizes).items()),
        aligned=tuple(argument for argument in types if argument.endswith("_ptr") or argument in ("m", "n")),
        options=tuple(options.items()),
    )


TRITON_KERNELS = (
    TritonKernel(
        "newton_schulz_squares",
        __name__,
        "_squares_kernel",
        tuple(_TILES),
        (("x_ptr", "*bf16"), ("squares_ptr", "*fp32"), ("size", "i32")),
        constants=(("PARTS", _PARTS), ("BLOCK", _SQUARES_BLOCK)),
        aligned=("x_ptr", "squares_ptr", "size"),
        options=tuple(_SQUARES_OPTIONS.items()),
    ),
    *(
        _ahead(arch, name, own=own, power=power, **kind)
        for arch in _TILES
        for name, own, powers, kinds in (
            ("gram_wide", False, (0, 2), ({}, {"tma": True})),
            ("gram_tall", False, (0, 2), ({"tall": True},)),
            ("polynomial", True, (0, 1), ({}, {"tma": True})),
        )
        for power in powers
        for kind in kinds
    ),
)
"""What is compiled ahead: for sides of multiples of 16."""
