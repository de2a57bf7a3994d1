"""Causal attention's forward in CUDA for Hopper: warp-specialised, by wgmma and TMA.

What it computes, and what it keeps for the backward, is what `attention_window_triton.forward` does.

Shapes: B batch, H heads, S positions, d query-key width, v value width.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from nmoe.kernels.native.attention_heads_cuda import ARCHES, CHUNK_BYTES, CHUNK_ROWS, heads_map, multiprocessors
from nmoe.kernels.native.attention_tiles_triton import empty_heads, for_tma
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap

_GROUP_QUERIES = 64
"""Of a consumer warpgroup."""
_FAR = 1024
"""Windows beyond count as none."""


@dataclass(frozen=True)
class Plan:
    """How one kernel is made and launched; the fields are attention_forward_sm90.cu's macros."""

    width: int
    """Columns of queries and keys, at most."""
    value: int
    """Columns of values, at most."""
    warpgroups: int
    """That multiply, each with 64 queries."""
    keys: int
    """Of a tile."""
    stages: int
    """Tiles of keys, and of values, in shared memory."""
    per_sm: int
    """Blocks of a multiprocessor."""
    ping_pong: bool
    """Whether warpgroups issue their products in turns."""

    @property
    def queries(self) -> int:
        """Of a block's tile."""
        return _GROUP_QUERIES * self.warpgroups

    @property
    def threads(self) -> int:
        """Of a block: one warpgroup more, which loads."""
        return 128 * (self.warpgroups + 1)

    @property
    def shared_bytes(self) -> int:
        """Dynamic, of a block: queries, rings of keys and values, warps' staging, barriers and the queue of tiles."""
        tiles = 2 * (self.queries * self.width + self.stages * self.keys * (self.width + self.value))
        return tiles + self.warpgroups * 4 * CHUNK_BYTES + 32 * self.stages + 16 * self.warpgroups + 64

    @property
    def source(self) -> CudaSource:
        """Of this plan's kernel."""
        macros = ("width", "value", "warpgroups", "keys", "stages", "per_sm", "ping_pong")
        defines = tuple((macro.upper(), int(getattr(self, macro))) for macro in macros)
        name = f"attention_forward_{self.width}_{self.value}_{self.queries}x{self.keys}"
        return CudaSource(name, "attention_forward_sm90.cu", "attention_forward", ARCHES, defines)


PLANS = {
    (64, 64): (Plan(64, 64, 1, 64, 2, 3, False), Plan(64, 64, 3, 128, 3, 1, True)),
    (128, 128): (Plan(128, 128, 3, 64, 3, 1, False), Plan(128, 128, 2, 128, 2, 1, False)),
    (192, 128): (Plan(192, 128, 3, 64, 2, 1, True), Plan(192, 128, 2, 128, 2, 1, True)),
}
"""By the most columns of keys and of values: for windows and documents, and for whole samples. The fastest found on an
H200 at B 8, H 16, S 4096 (128: B 32, H 6, S 2048; 64: B 32, H 12, S 2048): for windows of 128 and 512 together, and for
none."""

_KERNELS = {plan: CudaKernel(plan.source) for plans in PLANS.values() for plan in plans}

SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


class _Params(ctypes.Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("edge", "level", "counter")),
        *((name, ctypes.c_int32) for name in ("heads", "length", "window", "n_rows", "n_tiles")),
        ("exponent", ctypes.c_float),
        ("unused", ctypes.c_byte * 16),  # C++ rounds the size up to 64
    )


def plan_of(width: int, value: int, *, whole: bool) -> Plan:
    """For keys of `width` and values of `value` columns, at most 192 and 128; `whole`: no documents, and queries that
    see more than 1024 keys."""
    return next(plans for most, plans in PLANS.items() if width <= most[0] and value <= most[1])[whole]


def forward(
    q_BHSd: torch.Tensor,
    k_BHSd: torch.Tensor,
    v_BHSv: torch.Tensor,
    scale: float,
    window: int,
    document_start_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, H, S, v), a view of memory in the order (B, S, H, v), and fp32 levels (B, H, S): the score,
    without scale, at which a key's weight would be 1.

    Args:
        q_BHSd: bf16 queries, of none or more; widths and the rest as `attention_tiles_triton.check_heads` wants them.
        k_BHSd: bf16 keys.
        v_BHSv: bf16 values. Rows of all three must be dense and start at multiples of 16 bytes, or they are copied.
        scale: factor on the scores before the softmax.
        window: at least 1; S or more hides nothing.
        document_start_BS: as `nmoe.kernels.reference.attention.attention` has it.
    """
    batch, heads, length, width = q_BHSd.shape
    value = v_BHSv.shape[3]
    out_BHSv = empty_heads(q_BHSd, value)
    level_BHS = q_BHSd.new_empty(q_BHSd.shape[:3], dtype=torch.float32)
    if level_BHS.numel() == 0:
        return out_BHSv, level_BHS
    plan = plan_of(width, value, whole=document_start_BS is None and min(window, length) > _FAR)
    q_BHSd, k_BHSd, v_BHSv = for_tma(q_BHSd), for_tma(k_BHSd), for_tma(v_BHSv)
    edge_BS = None if document_start_BS is None else document_start_BS.contiguous()
    counter = torch.zeros(1, dtype=torch.int32, device=q_BHSd.device)
    n_rows = -(-length // plan.queries)
    n_tiles = batch * heads * n_rows
    params = _Params(
        q=heads_map(q_BHSd, _GROUP_QUERIES),
        k=heads_map(k_BHSd, plan.keys),
        v=heads_map(v_BHSv, plan.keys),
        out=heads_map(out_BHSv, CHUNK_ROWS),
        edge=None if edge_BS is None else edge_BS.data_ptr(),
        level=level_BHS.data_ptr(),
        counter=counter.data_ptr(),
        heads=heads,
        length=length,
        window=min(window, length),
        n_rows=n_rows,
        n_tiles=n_tiles,
        exponent=scale * math.log2(math.e),
    )
    blocks = min(n_tiles, plan.per_sm * multiprocessors(q_BHSd.get_device()))
    with torch.cuda.device_of(q_BHSd):
        _KERNELS[plan].launch((blocks, 1, 1), plan.threads, plan.shared_bytes, params)
    return out_BHSv, level_BHS
