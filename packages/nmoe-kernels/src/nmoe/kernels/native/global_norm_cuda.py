"""The 2-norm of many tensors as one vector, in one pass over memory and two launches (for up to 32 tensors)."""

import ctypes
from collections.abc import Sequence

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.native.streams import Stream, check_alignment, check_streams, check_words
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel

SOURCES = tuple(
    CudaSource(name, "global_norm.cu", name, ("sm_90a", "sm_100a")) for name in ("sum_squares", "root_of_sum")
)
"""Every compile of this module."""

_SQUARES, _ROOT = (CudaKernel(source) for source in SOURCES)
_TENSORS, _BLOCKS, _THREADS = 32, 1056, 256  # as the source has them


class _SquaresParams(ctypes.Structure):
    _fields_ = (
        ("tensor", ctypes.c_void_p * _TENSORS),
        ("n", ctypes.c_uint64 * _TENSORS),
        ("partial", ctypes.c_void_p),
        ("tensors", ctypes.c_int),
    )


class _RootParams(ctypes.Structure):
    _fields_ = (("partial", ctypes.c_void_p), ("norm", ctypes.c_void_p), ("n", ctypes.c_int))


def global_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """See `nmoe.kernels.reference.global_norm.global_norm`; tensors start at multiples of 16 bytes.

    Sums are in fp32 within a thread and a block (some hundred terms one after another, for a billion elements), then in
    double precision.

    Raises:
        ShapeError: a tensor is not as described, or there is none.
    """
    if not tensors:
        raise ShapeError("expected one tensor or more, found none: give the gradients' buffers")
    streams = [Stream(f"tensor {i}", tensor, torch.float32) for i, tensor in enumerate(tensors)]
    device = tensors[0].device
    for stream in streams:
        check_streams(stream)
        check_words(stream.name, stream.tensor, torch.float32, stream.tensor.numel(), device)
    check_alignment(*streams)
    launches = -(-len(tensors) // _TENSORS)
    partial = torch.empty(launches, _BLOCKS, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        for launch in range(launches):
            part = tensors[launch * _TENSORS : (launch + 1) * _TENSORS]
            params = _SquaresParams(partial=partial[launch].data_ptr(), tensors=len(part))
            for i, tensor in enumerate(part):
                params.tensor[i], params.n[i] = tensor.data_ptr(), tensor.numel()
            _SQUARES.launch((_BLOCKS, 1, 1), _THREADS, 0, params)
        root = _RootParams(partial=partial.data_ptr(), norm=norm.data_ptr(), n=partial.numel())
        _ROOT.launch((1, 1, 1), _THREADS, 0, root)
    return norm
