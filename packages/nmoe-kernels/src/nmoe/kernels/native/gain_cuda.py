"""The last sum of gains' gradients in CUDA: rows of partial sums straight to `main_grad`, one launch for all gains of
an op.

Each column's in one order, and no float is added by an atomic: same inputs, same bits.

Shapes: P partial sums, G gains of one op, D width.
"""

import ctypes
from collections.abc import Sequence

import torch
from nmoe.kernels.main_grad import accumulator_of, claim, deliver
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

_BATCH = {1: 5, 2: 32}
"""Partial sums that a thread reads at once, by G: all of one norm's, half of those of queries and keys."""
_COLUMNS, _THREADS = 32, 1024  # as gain.cu has them
_ROUND, _OVERWRITE, _ADD = 0, 1, 2

_KERNELS = {
    gains: CudaKernel(
        CudaSource(f"gain_{gains}", "gain.cu", "gain", ("sm_90a", "sm_100a"), (("GAINS", gains), ("BATCH", batch)))
    )
    for gains, batch in _BATCH.items()
}
SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


def _params(gains: int) -> type[ctypes.Structure]:
    class Params(ctypes.Structure):
        _fields_ = (
            ("partial", ctypes.c_void_p),
            ("out", ctypes.c_void_p * gains),
            ("how", ctypes.c_uint32 * gains),
            ("partials", ctypes.c_uint32),
            ("width", ctypes.c_uint32),
        )

    return Params


_PARAMS = {gains: _params(gains) for gains in _BATCH}


def deliver_sums(
    gains: Sequence[torch.Tensor], partial_PGD: torch.Tensor, wanted: Sequence[bool]
) -> list[torch.Tensor | None]:
    """As `main_grad.deliver` of the sum over P, of each gain that is wanted; None for the others.

    Args:
        gains: bf16 (D), the very parameters.
        partial_PGD: fp32, contiguous; G of 1 or 2.
        wanted: by gain.
    """
    if not any(wanted):
        return [None] * len(gains)
    accumulators = [accumulator_of(gain) for gain, wants in zip(gains, wanted, strict=True) if wants]
    if not (partial_PGD.is_cuda and _fit(accumulators)):
        sums = zip(gains, partial_PGD.sum(0), wanted, strict=True)
        return [deliver(gain, grad) if wants else None for gain, grad, wants in sums]
    partials, n_gains, width = partial_PGD.shape
    params = _PARAMS[n_gains](partial=partial_PGD.data_ptr(), partials=partials, width=width)
    grads: list[torch.Tensor | None] = [None] * n_gains
    for i, gain in enumerate(gains):
        if not wanted[i]:
            continue
        claimed = claim(gain)
        if claimed is None:
            grads[i] = out = torch.empty_like(gain, memory_format=torch.contiguous_format)
            how = _ROUND
        else:
            out, add = claimed
            how = _ADD if add else _OVERWRITE
        params.out[i], params.how[i] = out.data_ptr(), how
    with torch.cuda.device_of(partial_PGD):
        _KERNELS[n_gains].launch((-(-n_gains * width // _COLUMNS), 1, 1), _THREADS, 0, params)
    return grads


def _fit(accumulators: Sequence[torch.Tensor | None]) -> bool:
    """Whether the kernel can write to these: fp32, contiguous, and no two of them the same memory."""
    given = [tensor for tensor in accumulators if tensor is not None]
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in given) and len(
        {tensor.data_ptr() for tensor in given}
    ) == len(given)
