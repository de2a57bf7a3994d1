"""RMSNorm's backward in CUDA: bulk copies keep as many rows on their way as a block's shared memory holds.

The gain's gradient is summed by each thread over its rows, then over a block's teams, then over the blocks, by
`gain_cuda`.

Shapes: R rows, D width, P blocks' partial sums.
"""

import ctypes
from dataclasses import dataclass

import torch
from nmoe.kernels.native.gain_cuda import deliver_sums
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_ARCHES = ("sm_90a", "sm_100a")
_PIECE = 8
"""bf16 values of 16 bytes: what rows are multiples of, and start at multiples of."""
_LEAST_WIDTH = 256
"""Shorter rows leave most of a warp idle."""
_BLOCKS = 132
"""Of a launch, at most: one for each multiprocessor of an H200, and no more on a larger GPU, as the bits of the gain's
gradient depend on it."""


@dataclass(frozen=True)
class Plan:
    """How one kernel is made and launched; the fields are norm_backward.cu's macros."""

    team_warps: int
    """That share a row."""
    per: int
    """Pieces of a row that a thread has."""
    teams: int
    """Of a block."""
    stages: int
    """Rows of a team that are on their way or worked on."""
    add: bool
    """Whether the sum's gradient is read too, and added."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.team_warps * self.teams

    @property
    def max_width(self) -> int:
        """Of a row."""
        return 32 * self.team_warps * self.per * _PIECE

    def shared_bytes(self, width: int) -> int:
        """Dynamic, of a block: its teams' rows; and in the end its teams' sums in their place."""
        return max(self.teams * self.stages * (2 + self.add) * width * 2, self.teams * width * 4)

    def source(self, name: str) -> CudaSource:
        """Of this plan's kernel."""
        macros = ("team_warps", "per", "teams", "stages", "add")
        defines = tuple((macro.upper(), int(getattr(self, macro))) for macro in macros)
        return CudaSource(name, "norm_backward.cu", "norm_backward", _ARCHES, defines)


_SHAPES = ((1, 2, 16), (1, 3, 16), (1, 4, 16), (2, 4, 8), (4, 4, 4), (16, 4, 1))
"""Warps that share a row, pieces of a thread, and teams: for rows of up to 512, 768, 1024, 2048, 4096 and 16,384."""

_KERNELS = {
    add: tuple(
        (plan, CudaKernel(plan.source(f"{'add_' * add}rms_norm_backward_rows_{plan.max_width}")))
        for plan in (Plan(*shape, stages, add) for shape in _SHAPES)
    )
    for add, stages in ((False, 3), (True, 2))
}

SOURCES = tuple(kernel.source for kernels in _KERNELS.values() for _, kernel in kernels)
"""Every compile of this module."""


class _BackwardParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dout", "dtotal", "weight", "scale", "dx", "partial")),
        ("x_row", ctypes.c_uint64),
        ("n_rows", ctypes.c_uint32),
        ("pieces", ctypes.c_uint32),
    )


def takes(dout: torch.Tensor, dtotal: torch.Tensor | None, x_RD: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `backward` is for these: on a GPU; D a multiple of 8 from 256; all rows at multiples of 16 bytes.

    They are as `norm_triton.backward` has them, of at most 16,384 columns.
    """
    width = x_RD.shape[1]
    tensors = (dout, x_RD, weight) if dtotal is None else (dout, dtotal, x_RD, weight)
    return (
        x_RD.is_cuda
        and width >= _LEAST_WIDTH
        and width % _PIECE == 0
        and x_RD.stride(0) % _PIECE == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def backward(
    dout: torch.Tensor,
    dtotal: torch.Tensor | None,
    x_RD: torch.Tensor,
    scale_R: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    wants_dweight: bool,
) -> torch.Tensor | None:
    """As `norm_triton.backward`, of what `takes` says."""
    n_rows, width = x_RD.shape
    plan, kernel = _kernel_for(width, dtotal is not None)
    blocks = min(_BLOCKS, -(-n_rows // plan.teams))
    partial_PD = x_RD.new_empty(blocks, width, dtype=torch.float32) if wants_dweight else None
    if blocks:
        params = _BackwardParams(
            x=x_RD.data_ptr(),
            dout=dout.data_ptr(),
            dtotal=None if dtotal is None else dtotal.data_ptr(),
            weight=weight.data_ptr(),
            scale=scale_R.data_ptr(),
            dx=dx.data_ptr(),
            partial=None if partial_PD is None else partial_PD.data_ptr(),
            x_row=x_RD.stride(0) * x_RD.element_size(),
            n_rows=n_rows,
            pieces=width // _PIECE,
        )
        with torch.cuda.device_of(x_RD):
            kernel.launch((blocks, 1, 1), plan.threads, plan.shared_bytes(width), params)
    return None if partial_PD is None else deliver_sums((weight,), partial_PD[:, None], (True,))[0]


def _kernel_for(width: int, add: bool) -> tuple[Plan, CudaKernel]:
    return next((plan, kernel) for plan, kernel in _KERNELS[add] if width <= plan.max_width)
