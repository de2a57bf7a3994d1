"""What the kernels that stream flat tensors share: checks of what they are given, and their launch.

A block of `THREADS` threads takes `PIECES` pieces of four elements a thread.
"""

import ctypes
from typing import NamedTuple

import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.runtime.launch import CudaKernel

THREADS, PIECES = 256, 2
DEFINES = (("THREADS", THREADS), ("PIECES", PIECES))
"""Of every such source."""

_ALIGNMENT = 16


class Stream(NamedTuple):
    """A tensor that a kernel reads or writes from one end to the other."""

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype


def check_streams(*streams: Stream) -> None:
    """All are of the first one's number of elements, on its device.

    Raises:
        ShapeError: one is not, or is of another dtype, strided, or not on a GPU.
    """
    first = streams[0].tensor
    for name, tensor, dtype in streams:
        fits = (
            tensor.dtype == dtype
            and tensor.is_cuda
            and tensor.device == first.device
            and tensor.numel() == first.numel()
            and tensor.is_contiguous()
        )
        if not fits:
            raise _not_as_expected(f"{name} of {first.numel()} elements", dtype, first.device, tensor)


def check_alignment(*streams: Stream) -> None:
    """Apart, since tensors without memory, which have shapes to check, have no address.

    Raises:
        ShapeError: one starts off a multiple of 16 bytes.
    """
    for name, tensor, _ in streams:
        if tensor.data_ptr() % _ALIGNMENT:
            raise ShapeError(
                f"expected {name} to start at a multiple of {_ALIGNMENT} bytes, found {tensor.data_ptr():#x}: "
                "lay it out in a flat buffer that starts every tensor at one"
            )


def check_words(name: str, tensor: torch.Tensor, dtype: torch.dtype, count: int, device: torch.device) -> None:
    """A few words on the device that a kernel looks at.

    Raises:
        ShapeError: of another number, dtype or device.
    """
    fits = tensor.dtype == dtype and tensor.numel() == count and tensor.device == device and tensor.is_contiguous()
    if not fits:
        raise _not_as_expected(f"{name} of {count} elements", dtype, device, tensor)


def launch_over(tensor: torch.Tensor, kernel: CudaKernel, params: ctypes.Structure) -> None:
    """One launch on the tensor's device, of as many blocks as take all its elements; none where it has no element."""
    blocks = -(-tensor.numel() // (THREADS * PIECES * 4))
    if blocks:
        with torch.cuda.device(tensor.device):
            kernel.launch((blocks, 1, 1), THREADS, 0, params)


def _not_as_expected(what: str, dtype: torch.dtype, device: torch.device, found: torch.Tensor) -> ShapeError:
    place = device if device.type == "cuda" else "a CUDA device"
    layout = "contiguous" if found.is_contiguous() else "strided"
    return ShapeError(
        f"expected {what}, contiguous {dtype} on {place}; found {tuple(found.shape)}, {layout} {found.dtype} on "
        f"{found.device}: convert it, or set runtime.kernels = 'reference'"
    )
