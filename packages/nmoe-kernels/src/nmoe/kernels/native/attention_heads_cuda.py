"""Heads of attention as the CUDA kernels read and write them: by TMA, in boxes of some positions and 64 columns.

Shapes: B batch, H heads, S positions, d columns.
"""

import functools

import torch
from nmoe.kernels.runtime.launch import TensorMap, tensor_map

ARCHES = ("sm_90a",)
"""That these kernels are written for."""
COLUMNS = 64
"""Of a box: bf16 in a row of the 128-byte swizzle."""
CHUNK_ROWS = 16
"""Positions that a warp writes at once."""
CHUNK_BYTES = CHUNK_ROWS * COLUMNS * 2


def heads_map(x_BHSd: torch.Tensor, rows: int) -> TensorMap:
    """Boxes of `rows` positions and 64 columns of a bf16 tensor that `attention_tiles_triton.for_tma` gave; past the
    last position and column, reads give zeros and stores drop."""
    dims = tuple(x_BHSd.shape[::-1])
    strides = tuple(
        (dims[0] if size == 1 else stride) * 2  # a lone dimension's stride means nothing and may be anything
        for size, stride in zip(dims[1:], x_BHSd.stride()[2::-1], strict=True)
    )
    return tensor_map(x_BHSd, dims, strides, (COLUMNS, rows, 1, 1), True)


@functools.cache
def multiprocessors(device: int) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
