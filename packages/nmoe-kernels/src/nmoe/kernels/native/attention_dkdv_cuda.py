"""The first kernel of causal attention's backward on Hopper: gradients of keys and values, and those of the scores,
from which a product makes the queries' (`attention_dq_cuda`).

Scores and weights are made once, four products. The scores' gradients (bf16, without scale) go to a workspace of little
more than the pairs that a window lets through, or of half the square. With b = key // 128, n = ceil(S / 128) and W the
window, element (key, query) is at

- under a window (a band): row key, column query - 128 b, of 128 + W - 1 columns, up to a multiple of 128;
- without one (folded): if 2 b <= n - 1, row key, column query + 128; else row 128 (n - 1 - b) + key % 128, column
  query - 128 b. That is ceil(n / 2) 128 rows of (n + 1) 128 columns: two blocks of keys visit n + 1 of queries.

Every block of 128 keys by 128 queries that holds a visible pair is written whole, with 0 for hidden pairs.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import ctypes
from dataclasses import dataclass

import torch
from nmoe.kernels.native.attention_heads_cuda import ARCHES, CHUNK_BYTES, CHUNK_ROWS, COLUMNS, heads_map
from nmoe.kernels.native.attention_problem_cuda import Gradients, Problem
from nmoe.kernels.native.attention_tiles_triton import WIDEST_VALUE
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, TensorMap, tensor_map

KEYS = 128
"""Of a block, and as many queries."""
_QUERIES = 64
"""Of a tile."""
_THREADS = 384
_WARPS = 8
"""That multiply, with 16 keys each."""
_EARLY, _STAGED = 0, 1


@dataclass(frozen=True)
class Plan:
    """How one kernel is made; the fields are attention_dkdv_sm90.cu's macros."""

    width: int
    stages: int
    sums: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic, of a block: keys, values, the ring with its numbers, what is staged, barriers, and a spare."""
        columns = self.width + WIDEST_VALUE
        stage = columns * _QUERIES * 2 + _QUERIES * 8
        return columns * KEYS * 2 + self.stages * stage + _WARPS * CHUNK_BYTES + 8 * (2 + 3 * self.stages) + 16

    def source(self, fold: bool) -> CudaSource:
        """Of this plan's kernel for one layout of the workspace."""
        macros = ("width", "stages", "sums")
        name = f"attention_dkdv_{self.width}_{'fold' if fold else 'band'}"
        defines = (*((macro.upper(), getattr(self, macro)) for macro in macros), ("FOLD", int(fold)))
        return CudaSource(name, "attention_dkdv_sm90.cu", "attention_dkdv", ARCHES, defines)


PLANS = (Plan(128, 4, _EARLY), Plan(192, 3, _STAGED))
"""The first that is wide enough for the keys is taken."""

_KERNELS = {(plan, fold): CudaKernel(plan.source(fold)) for plan in PLANS for fold in (False, True)}

SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


class _Params(ctypes.Structure):
    _fields_ = (
        *((name, TensorMap) for name in ("q", "k", "v", "dout", "dk", "dv", "dscore")),
        *((name, ctypes.c_void_p) for name in ("level", "delta", "last")),
        *((name, ctypes.c_int) for name in ("heads", "length", "window", "blocks", "first_head", "n_heads")),
        ("exponent", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("unused", ctypes.c_byte * 8),  # C++ rounds the size up to 64
    )


def workspace_shape(length: int, window: int) -> tuple[int, int]:
    """Of a head's gradients of scores."""
    blocks = -(-length // KEYS)
    if window >= length:
        return -(-blocks // 2) * KEYS, (blocks + 1) * KEYS
    return blocks * KEYS, -(-(KEYS + window - 1) // KEYS) * KEYS


def dkdv(problem: Problem, grads: Gradients, dscore: torch.Tensor, first_head: int) -> None:
    """Writes the gradients of keys, values and scores of as many heads as the workspace has.

    Args:
        problem: of wide heads.
        grads: those of keys and values are written.
        dscore: bf16 (heads, *`workspace_shape(S, window)`), contiguous: the workspace, written.
        first_head: of the workspace's; a head's number is batch · H + head.
    """
    _, heads, length, width = problem.q_BHSd.shape
    n_heads = dscore.shape[0]
    plan = next(plan for plan in PLANS if width <= plan.width)
    blocks = -(-length // KEYS)
    params = _Params(
        q=heads_map(problem.q_BHSd, _QUERIES),
        k=heads_map(problem.k_BHSd, KEYS),
        v=heads_map(problem.v_BHSv, KEYS),
        dout=heads_map(problem.dout_BHSv, _QUERIES),
        dk=heads_map(grads.dk_BHSd, CHUNK_ROWS),
        dv=heads_map(grads.dv_BHSv, CHUNK_ROWS),
        dscore=workspace_map(dscore, CHUNK_ROWS),
        level=problem.level_BHS.data_ptr(),
        delta=problem.delta_BHS.data_ptr(),
        last=None if problem.last_BS is None else problem.last_BS.data_ptr(),
        heads=heads,
        length=length,
        window=min(problem.window, length),
        blocks=blocks,
        first_head=first_head,
        n_heads=n_heads,
        exponent=problem.exponent,
        scale=problem.scale,
    )
    kernel = _KERNELS[plan, problem.window >= length]
    kernel.launch((n_heads * blocks, 1, 1), _THREADS, plan.shared_bytes, params)


def workspace_map(dscore: torch.Tensor, rows: int) -> TensorMap:
    """Boxes of `rows` keys and 64 queries of the workspace."""
    heads, n_rows, columns = dscore.shape
    return tensor_map(dscore, (columns, n_rows, heads), (2 * columns, 2 * columns * n_rows), (COLUMNS, rows, 1), True)
