"""What the kernels of attention share: how their work is cut into tiles, and how a tile is found in memory.

Tiles come by TMA, by a descriptor of the whole tensor: it takes any strides, fills with zeros what lies beyond the last
position or column, and drops what is stored there. A width that is no power of two is the sum of two parts, each a
power of two, of which the second may reach beyond the last column: 192 = 128 + 64.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from nmoe.kernels.arch import entry_for
from nmoe.kernels.errors import KernelError, ShapeError
from nmoe.kernels.runtime.triton_aot import TritonKernel
from triton.tools.tensor_descriptor import TensorDescriptor

WIDEST_KEY = 192
WIDEST_VALUE = 128
_STEP = 8
"""bf16 values in 16 bytes: TMA's unit."""


class Tile(NamedTuple):
    """Of one kernel's programs."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Tiles of the inner loop that are in shared memory at once."""


class Tiles(NamedTuple):
    """Of the three kernels for one range of widths and windows."""

    forward: Tile
    dq: Tile
    dkdv: Tile


Reach = Literal["narrow", "wide", "all", "packed"]
"""Of a window: up to 256, where a small tile's fewer hidden scores count for more than a large tile's fewer loads;
up to 1024; beyond, or no window at all; the same in documents."""

_HOPPER: dict[tuple[int, int, Reach], Tiles] = {
    (64, 64, "narrow"): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (64, 64, "wide"): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    (64, 64, "all"): Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 128, 4, 3)),
    (64, 64, "packed"): Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    (128, 128, "narrow"): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    (128, 128, "wide"): Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2)),
    (128, 128, "all"): Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    (128, 128, "packed"): Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    (192, 128, "narrow"): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2)),
    (192, 128, "wide"): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2)),
    (192, 128, "all"): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)),
    (192, 128, "packed"): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)),
}
_BLACKWELL = {  # never timed; where Hopper's would spill, another's
    **_HOPPER,
    (64, 64, "all"): _HOPPER[64, 64, "all"]._replace(forward=Tile(64, 64, 4, 2)),
    (64, 64, "packed"): _HOPPER[64, 64, "packed"]._replace(forward=Tile(64, 64, 4, 2)),
    (128, 128, "narrow"): _HOPPER[128, 128, "narrow"]._replace(forward=Tile(64, 64, 4, 3)),
    (192, 128, "wide"): _HOPPER[192, 128, "wide"]._replace(forward=Tile(64, 32, 4, 2)),
}
TILES = {"sm_90a": _HOPPER, "sm_100a": _BLACKWELL}
"""By arch; the most columns of keys and of values; and the window's reach. The fastest found on an H200 at B 8, H 16,
S 4096 (widths of 64: B 32, H 12, S 2048) and windows of 128, of 512, and none. `packed` was never timed: it is `all`,
but for a tile that would spill."""


def reach_of(window: int, documents: bool) -> Reach:
    """Of a window, in documents or whole samples."""
    if window <= 1024:
        return "narrow" if window <= 256 else "wide"
    return "packed" if documents else "all"


def tiles_of(width: int, value: int, reach: Reach, device: torch.device) -> Tiles:
    """For keys of `width` and values of `value` columns; both at most as wide as the widest.

    Raises:
        UnsupportedArchError: there are no tiles for the device.
    """
    key, value = next(wide for wide in ((64, 64), (128, 128), (192, 128)) if width <= wide[0] and value <= wide[1])
    return _tiles_by_widths(device)[key, value, reach]


@functools.cache
def _tiles_by_widths(device: torch.device) -> dict[tuple[int, int, Reach], Tiles]:
    if device.type == "cpu":  # Triton interprets
        return _HOPPER
    return entry_for(device, TILES, "the attention kernels")


def check_heads(q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, scale: float) -> None:
    """Refuses what the kernels cannot take.

    Raises:
        ShapeError: lengths, dtypes, widths or devices; the message says how to mend it.
        KernelError: the scale.
    """
    tensors = (q_BHSd, k_BHSd, v_BHSv)
    width, value = q_BHSd.shape[3], v_BHSv.shape[3]
    if q_BHSd.shape[2] != k_BHSd.shape[2]:
        raise ShapeError(
            f"expected as many queries as keys, found {q_BHSd.shape[2]} and {k_BHSd.shape[2]}: "
            "call nmoe.kernels.reference.attention.attention"
        )
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        raise ShapeError(
            f"expected q, k and v of torch.bfloat16, found {', '.join(str(tensor.dtype) for tensor in tensors)}: "
            "convert them, or set runtime.kernels = 'reference'"
        )
    if width % 16 or value % 16 or not (16 <= width <= WIDEST_KEY and 16 <= value <= WIDEST_VALUE):
        raise ShapeError(
            f"expected widths of multiples of 16, of keys up to {WIDEST_KEY} and of values up to {WIDEST_VALUE}; found "
            f"{width} and {value}: pad them, or set runtime.kernels = 'reference'"
        )
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise ShapeError(f"expected all tensors on one device, found {', '.join(devices)}: move them to one")
    if not 0 < scale < math.inf:
        raise KernelError(f"expected a finite scale above 0, found {scale}: set runtime.kernels = 'reference'")


class Widths(NamedTuple):
    """Columns of a program's tiles, each a power of two."""

    key: int
    """Of queries and keys: the first part."""
    rest: int
    """Of queries and keys: the second part; 0: there is none."""
    value: int

    def constants(self, tile: Tile) -> dict[str, int]:
        """A launch's `tl.constexpr` arguments."""
        return {
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
            "WIDTH": self.key,
            "REST": self.rest,
            "VALUE": self.value,
        }


def widths_of(width: int, value: int) -> Widths:
    """For keys of `width` and values of `value` columns, multiples of 16."""
    first = 1 << (width.bit_length() - 1)
    rest = triton.next_power_of_2(width - first) if width > first else 0
    return Widths(first, rest, triton.next_power_of_2(value))


def options_of(tile: Tile) -> dict[str, Any]:
    """A launch's options."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def for_tma(x_BHSd: torch.Tensor) -> torch.Tensor:
    """The tensor itself where TMA can read it: dense rows, each at a multiple of 16 bytes; else a copy."""
    strides = [stride for size, stride in zip(x_BHSd.shape[:3], x_BHSd.stride(), strict=False) if size > 1]
    if x_BHSd.stride(3) == 1 and all(s > 0 and s % _STEP == 0 for s in strides) and x_BHSd.data_ptr() % 16 == 0:
        return x_BHSd
    return x_BHSd.clone(memory_format=torch.contiguous_format)


def describe(x_BHSd: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of `rows` positions and `columns` columns of a tensor that `for_tma` gave."""
    strides = [
        x_BHSd.shape[3] if size == 1 else stride  # a lone dimension's stride means nothing and may be anything
        for size, stride in zip(x_BHSd.shape[:3], x_BHSd.stride(), strict=False)
    ]
    return TensorDescriptor(x_BHSd, list(x_BHSd.shape), [*strides, 1], [1, 1, rows, columns])


def describe_parts(x_BHSd: torch.Tensor, rows: int, widths: Widths) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of both parts of queries, keys, or their gradients; where there is no second part, no kernel reads its own."""
    first = describe(x_BHSd, rows, widths.key)
    return first, describe(x_BHSd, rows, widths.rest) if widths.rest else first


def describe_inputs(
    q_BHSd: torch.Tensor, k_BHSd: torch.Tensor, v_BHSv: torch.Tensor, tile: Tile, widths: Widths
) -> tuple[TensorDescriptor, ...]:
    """Of both parts of queries, both of keys, and values: what every kernel takes first."""
    return (
        *describe_parts(q_BHSd, tile.queries, widths),
        *describe_parts(k_BHSd, tile.keys, widths),
        describe(v_BHSv, tile.keys, widths.value),
    )


def empty_heads(like_BHSd: torch.Tensor, width: int) -> torch.Tensor:
    """(B, H, S, `width`), a view of memory in the order (B, S, H, `width`)."""
    batch, heads, length, _ = like_BHSd.shape
    return like_BHSd.new_empty(batch, length, heads, width).transpose(1, 2)


def launch(
    kernel: Any,
    tile: Tile,
    widths: Widths,
    tensors: Sequence[TensorDescriptor | torch.Tensor],
    numbers: Sequence[float],
    edge_BS: torch.Tensor | None,
    like_BHSd: torch.Tensor,
    rows: int,
) -> None:
    """One program for `rows` positions of a head; the kernel takes tensors, heads, length, `numbers`, and then what
    `edges` takes, or None, with which it is compiled as if there were no documents."""
    batch, heads, length, _ = like_BHSd.shape
    with torch.cuda.device_of(like_BHSd):
        kernel[(batch * heads * triton.cdiv(length, rows),)](
            *tensors, heads, length, *numbers, edge_BS, **widths.constants(tile), **options_of(tile)
        )


def ahead_of_launch(
    name: str, module: str, function: str, tensors: Sequence[str], numbers: Sequence[str], kernel: Literal[0, 1, 2]
) -> tuple[TritonKernel, ...]:
    """The compiles of one kernel, without documents and with them, for every entry of the table, of which it takes the
    tile `kernel`.

    A tensor's name tells its tile: `q…` and `…out` are queries, all others keys; `v`, `dv` and `…out` have the width of
    values; `…_rest` are second parts; and `…_ptr` is fp32, a number for each query.
    """
    edge: dict[str, Any] = {"edge_ptr": None}
    return tuple(
        TritonKernel(
            f"{name}{'_documents' if documents else ''}_{key}_{value}_{reach}_{arch}",
            module,
            function,
            (arch,),
            (
                *((tensor, _type_of(tensor, tiles[kernel], widths_of(key, value))) for tensor in tensors),
                *dict.fromkeys(("heads", "length", "window"), "i32").items(),
                *dict.fromkeys(numbers, "fp32").items(),
                *dict.fromkeys(edge if documents else (), "*i32").items(),
            ),
            constants=tuple((({} if documents else edge) | widths_of(key, value).constants(tiles[kernel])).items()),
            aligned=tuple(n for n in (*tensors, *(edge if documents else ())) if n.endswith("_ptr")),
            options=tuple(options_of(tiles[kernel]).items()),
        )
        for documents in (False, True)
        for arch, by_widths in TILES.items()
        for (key, value, reach), tiles in by_widths.items()
        if reach != ("all" if documents else "packed")
    )


def _type_of(tensor: str, tile: Tile, widths: Widths) -> str:
    if tensor.endswith("_ptr"):
        return "*fp32"
    rows = tile.queries if "q" in tensor or "out" in tensor else tile.keys
    if tensor.endswith("_rest"):
        columns = widths.rest or widths.key
    else:
        columns = widths.value if "v" in tensor or "out" in tensor else widths.key
    return f"tensordesc<bf16[1, 1, {rows}, {columns}]>"


@triton.jit
def owned(heads, length, ROWS: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Batch, head and first position of this program: heads run fastest, as in memory, so that a page is read whole
    and neighbours in position, which share keys, run at the same time. Longest programs first: without a window, those
    of the last queries and of the first keys."""
    program = tl.program_id(0)
    blocks = tl.cdiv(length, ROWS)
    block = program // heads % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return program // heads // blocks, program % heads, block * ROWS


@triton.jit
def load_tile(tensor, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of one head; zeros beyond the last position or column."""
    return tensor.load([batch, head, row, column]).reshape(ROWS, COLUMNS)


@triton.jit
def store_tile(tensor, batch, head, row, column, tile):
    """Rounds a tile to bf16; what is beyond the last position or column is dropped."""
    tensor.store([batch, head, row, column], tile.to(tl.bfloat16).reshape(1, 1, tile.shape[0], tile.shape[1]))


@triton.jit
def edges(edge_ptr, batch, block, length, window, ROWS: tl.constexpr):
    """Of the `ROWS` positions from `block` on, in documents: the first one's edge, the last one's, and how far each one
    reaches, itself included, as a column. A query's edge is the first key that it may see, a key's the last query that
    may see it; along a sample, edges never decrease."""
    edge_ptr += batch.to(tl.int64) * length
    row = block + tl.arange(0, ROWS)
    edge = tl.load(edge_ptr + row, mask=row < length, other=row)
    reach = tl.minimum(tl.abs(row - edge) + 1, window)
    return tl.load(edge_ptr + block), tl.load(edge_ptr + tl.minimum(block + ROWS, length) - 1), reach[:, None]


@triton.jit
def hide(start, ahead, query, key, corner, reach, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """What scores start from, and -inf where the query does not see the key: before the products are added, since the
    tensor cores are then still at work on the products before. `ahead` is a query's place in its tile less a key's.
    `reach` is the window or, in documents, what `edges` gives; `corner` that between last query and first key."""
    if (key + KEYS > query + 1) | (key < query + QUERIES - corner):
        distance = ahead + (query - key)
        # A negative distance is a large number without its sign.
        start = tl.where(distance.to(tl.uint32, bitcast=True) < reach.to(tl.uint32), start, float("-inf"))
    return start
