"""Launches of CUDA kernels that take one struct by value, with little host time, in and out of CUDA graph capture.

A kernel is `extern "C" __global__ void entry(const __grid_constant__ Params p)`, and `Params` here a `ctypes.Structure`
with the same fields in the same order. In C++ a `TensorMap` is `struct alignas(64) TensorMap { unsigned long long
v[16]; }`, and ctypes knows no such alignment: **tensor maps come first in the struct**, where both layouts agree.
"""

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from cuda.bindings import driver
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.errors import KernelError, ShapeError, UnsupportedArchError
from nmoe.kernels.runtime.cache import CachedKernel, current_cache
from nmoe.kernels.runtime.cuda_source import CudaSource

_SUCCESS = driver.CUresult.CUDA_SUCCESS
_ArgumentPointers = ctypes.c_void_p * 1
_launch, _launch_with = driver.cuLaunchKernel, driver.cuLaunchKernelEx
_addressof = ctypes.addressof

_DATA_TYPES = {
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float32: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    torch.float8_e4m3fn: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.uint8: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
}


class KernelLaunchError(KernelError):
    """The driver refuses to load or launch a kernel."""


class TensorMap(ctypes.Structure):
    """A TMA descriptor by value, 128 bytes. Comes first in a kernel's struct (see the module)."""

    _fields_ = (("v", ctypes.c_uint64 * 16),)


class CudaKernel:
    """A kernel that is compiled (or read from the cache) and loaded on first use, once for each device.

    Args:
        source: what is compiled.
    """

    def __init__(self, source: CudaSource) -> None:
        self.source = source
        self._loaded: dict[int, _Loaded] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        params: ctypes.Structure,
        stream: int | None = None,
        *,
        early: bool = False,
    ) -> None:
        """Launches on torch's current device. Nothing waits and nothing is allocated on the device, so that a kernel
        which is loaded already may be captured in a CUDA graph; load it before the capture, by a launch or `load`.

        Args:
            grid: blocks in x, y, z.
            block: threads in x.
            shared_bytes: dynamic shared memory of a block.
            params: the kernel's struct; copied, so that it may be changed afterwards.
            stream: `cudaStream_t` as an integer; None: torch's current stream.
            early: it may be set up while the kernel ahead of it in the stream ends: it begins with griddepcontrol.wait
                (CUDA C++ Programming Guide, "Programmatic Dependent Launch").

        Raises:
            UnsupportedArchError: the kernel is not written for the device.
            KernelLaunchError: the driver refuses, or `params` has another size than the kernel's struct.
        """
        loaded = self._loaded.get(torch._C._cuda_getDevice()) if self._loaded else None
        if loaded is None:
            loaded = self.load()
        if shared_bytes > loaded.shared_limit:
            loaded.raise_shared_limit(shared_bytes)
        block_of_params = params if type(params) is loaded.params_type else loaded.fit(params)
        if stream is None:
            stream = torch._C._cuda_getCurrentRawStream(loaded.device)
        pointers = _ArgumentPointers(_addressof(block_of_params))
        if early:
            status = loaded.launch_early(grid, block, shared_bytes, stream, pointers)
        else:
            x, y, z = grid
            (status,) = _launch(loaded.function, x, y, z, block, 1, 1, shared_bytes, stream, _addressof(pointers), 0)
        if status is not _SUCCESS:
            loaded.launch_again(status, grid, block, shared_bytes, stream, pointers)

    def load(self, device: int | None = None) -> "_Loaded":
        """Compiles or reads the kernel, and loads it on `device` (None: torch's current one), if that is to be done.

        Raises:
            UnsupportedArchError: there is no GPU, or the kernel is not written for it.
            KernelCompileError: the source has errors.
            KernelLaunchError: the driver refuses the machine code.
        """
        arch = detect_arch("cuda" if device is None else f"cuda:{device}")
        if arch not in self.source.arches:
            raise UnsupportedArchError(
                f"expected one of {', '.join(self.source.arches)} for kernel '{self.source.name}', found {arch}: "
                "set runtime.kernels = 'reference'"
            )
        index = torch.cuda.current_device() if device is None else device
        with self._lock:
            if index not in self._loaded:
                cached = current_cache().get(self.source, arch)
                with torch.cuda.device(index):
                    self._loaded[index] = _Loaded(self.source, cached.cubin, index)
            return self._loaded[index]


class _Loaded:
    """A kernel on one device, in its primary context."""

    def __init__(self, source: CudaSource, cubin: bytes, device: int) -> None:
        from cuda.core import ObjectCode

        self.name, self.device = source.name, device
        # The primary context, which is torch's too: an explicit handle, for threads that have not used CUDA yet.
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._call(driver.cuDeviceGet(device))))
        self._call(driver.cuCtxSetCurrent(self._context))
        try:
            self._code = ObjectCode.from_cubin(cubin, name=source.name)
            kernel = self._code.get_kernel(source.entry).handle
        except Exception as error:  # cuda-core's own error types are not public
            raise KernelLaunchError(
                f"expected cuda:{device} to load kernel '{source.name}', found {error}: "
                "update the driver to the CUDA version of NVRTC, or remove the file from the kernel cache"
            ) from error
        self.function = self._call(driver.cuKernelGetFunction(kernel))
        _, self._params_bytes = self._call(driver.cuKernelGetParamInfo(kernel, 0))
        self.params_type: type[ctypes.Structure] | None = None
        self._lock = threading.Lock()
        self.shared_limit = 0  # what has been asked for; the driver's own default counts static memory too
        self._early = _early_config()

    def raise_shared_limit(self, shared_bytes: int) -> None:
        """A kernel asks for the most dynamic shared memory that it has needed yet."""
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._lock:
            if shared_bytes > self.shared_limit:
                asked = driver.cuFuncSetAttribute(self.function, attribute, shared_bytes)
                self._call(asked, f"{shared_bytes} B of shared memory")
                self.shared_limit = shared_bytes

    def fit(self, params: ctypes.Structure) -> Any:
        """`params` in as many bytes as the driver reads: C++ rounds a struct with tensor maps up to 64 bytes."""
        size = ctypes.sizeof(params)
        if size == self._params_bytes:
            self.params_type = type(params)
            return params
        has_maps = next(iter(type(params)._fields_))[1] is TensorMap
        if not has_maps or -(-size // 64) * 64 != self._params_bytes:
            raise KernelLaunchError(
                f"expected a struct of {self._params_bytes} bytes for kernel '{self.name}', found "
                f"{type(params).__name__} of {size}: give both the same fields, tensor maps first"
            )
        padded = (ctypes.c_uint64 * (self._params_bytes // 8))()
        ctypes.memmove(padded, ctypes.byref(params), size)
        return padded

    def launch_early(
        self, grid: tuple[int, int, int], block: int, shared_bytes: int, stream: int, pointers: Any
    ) -> driver.CUresult:
        """As `cuLaunchKernel`, but the kernel may be set up before the one ahead of it has ended."""
        with self._lock:
            config = self._early
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.sharedMemBytes, config.hStream = block, shared_bytes, stream
            (status,) = _launch_with(config, self.function, _addressof(pointers), 0)
        return status

    def launch_again(
        self,
        status: Any,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        stream: int,
        pointers: Any,
    ) -> None:
        """After a refusal. A thread that has not used CUDA yet has no context; any other refusal is an error."""
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            self._call(driver.cuCtxSetCurrent(self._context))
            (status,) = _launch(self.function, *grid, block, 1, 1, shared_bytes, stream, _addressof(pointers), 0)
        self._call((status,), f"a grid of {grid}, {block} threads and {shared_bytes} B of dynamic shared memory")

    def _call(self, result: tuple[Any, ...], what: str = "") -> Any:
        status, *values = result
        if status != _SUCCESS:
            told = f" with {what}" if what else ""
            raise KernelLaunchError(
                f"expected cuda:{self.device} to run kernel '{self.name}'{told}, found {driver.CUresult(status).name}: "
                "check the launch against the device's limits; errors of earlier kernels may show here, which "
                "CUDA_LAUNCH_BLOCKING=1 tells apart"
            )
        return values[0] if len(values) == 1 else tuple(values)


def _early_config() -> driver.CUlaunchConfig:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.blockDimY = config.blockDimZ = 1
    config.attrs, config.numAttrs = [attribute], 1
    return config


def compile_all(sources: Sequence[CudaSource], arch: str, threads: int) -> list[CachedKernel]:
    """Compiles what the cache lacks, `threads` at once, and gives the kernels in the order of `sources`.

    Raises:
        KernelCompileError: a source has errors (the first in order; the others are compiled all the same).
    """
    cache = current_cache()
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(cache.get, source, arch) for source in sources]
    return [future.result() for future in futures]


def tensor_map(
    tensor: torch.Tensor,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_128b: bool,
    l2_promotion_256b: bool = True,
) -> TensorMap:
    """TMA descriptor of the tiles of a tensor; elements outside of `dims` read as zero.

    Descriptors are kept by their arguments (the last 4096), never the tensor. Copy it into a kernel's struct; do not
    change it.

    Args:
        tensor: begins at `data_ptr()`, a multiple of 16 bytes; its own shape and strides are not looked at.
        dims: elements, innermost first; 1 to 5 dimensions.
        strides_bytes: of `dims[1:]`; multiples of 16. The innermost dimension is dense.
        box: elements of a tile, each at most 256, innermost first.
        swizzle_128b: 128-byte swizzle of the tile in shared memory; its rows are then at most 128 bytes.
        l2_promotion_256b: L2 fetches 256 bytes, else 128.

    Raises:
        ShapeError: TMA cannot describe this; the message names the rule.
    """
    device = tensor.get_device()
    return _encode(device, tensor.data_ptr(), tensor.dtype, dims, strides_bytes, box, swizzle_128b, l2_promotion_256b)


@lru_cache(maxsize=4096)
def _encode(
    device: int,
    pointer: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_128b: bool,
    l2_promotion_256b: bool,
) -> TensorMap:
    _check_tiles(pointer, dtype, dims, strides_bytes, box, swizzle_128b)
    promotion, swizzle = driver.CUtensorMapL2promotion, driver.CUtensorMapSwizzle
    rank = len(dims)
    room = (ctypes.c_uint64 * 24)()
    at = -_addressof(room) % 64
    arguments = (
        _addressof(room) + at,
        _DATA_TYPES[dtype],
        rank,
        pointer,
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * rank)(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B if swizzle_128b else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
        if l2_promotion_256b
        else promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    status = _encoder()(*arguments)
    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        _enter_primary_context(device)
        status = _encoder()(*arguments)
    if status != _SUCCESS:
        raise ShapeError(
            f"expected tiles that TMA can describe, found {driver.CUresult(status).name} for dims {dims}, strides "
            f"{strides_bytes} B, box {box} of {dtype} at {pointer:#x}: see cuTensorMapEncodeTiled's rules"
        )
    return TensorMap.from_buffer_copy(room, at)


@lru_cache(maxsize=1)
def _encoder() -> Any:
    """cuTensorMapEncodeTiled itself: it wants a result aligned to 64 bytes, which cuda.bindings' wrapper does not give
    (13.5)."""
    version = 12000  # the first with tensor maps
    status, address, _ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", version, 0)
    if status != _SUCCESS or not address:
        raise KernelLaunchError(
            f"expected a driver with cuTensorMapEncodeTiled, found {status.name}: update it to one for CUDA 13"
        )
    pointer, integer = ctypes.c_void_p, ctypes.c_uint32
    arrays = (pointer, pointer, pointer, pointer)
    choices = (ctypes.c_int,) * 4
    return ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int, integer, pointer, *arrays, *choices)(address)


def _enter_primary_context(device: int) -> None:
    """For a thread that has not used CUDA yet, as autograd's may be."""
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    if status == _SUCCESS:
        (status,) = driver.cuCtxSetCurrent(context)
    if status != _SUCCESS:
        raise KernelLaunchError(
            f"expected to enter the context of cuda:{device}, found {status.name}: restart the process"
        )


def _check_tiles(
    pointer: int,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_128b: bool,
) -> None:
    """The rules of cuTensorMapEncodeTiled that shapes and views break most."""
    row_bytes = box[0] * dtype.itemsize if box else 0
    rules = (
        (dtype in _DATA_TYPES, f"a dtype out of {', '.join(str(d) for d in _DATA_TYPES)}", dtype),
        (pointer % 16 == 0, "a tensor that starts at a multiple of 16 bytes", hex(pointer)),
        (1 <= len(dims) <= 5 and all(n >= 1 for n in dims), "1 to 5 dimensions of 1 or more", dims),
        (len(strides_bytes) == len(dims) - 1, "strides of all dimensions but the innermost", strides_bytes),
        (all(n % 16 == 0 for n in strides_bytes), "strides of multiples of 16 bytes", strides_bytes),
        (len(box) == len(dims) and all(1 <= n <= 256 for n in box), "a box of 1 to 256 in each dimension", box),
        (row_bytes % 16 == 0, "box rows of a multiple of 16 bytes", f"{row_bytes} B"),
        (not swizzle_128b or row_bytes <= 128, "box rows of at most 128 bytes if swizzled", f"{row_bytes} B"),
    )
    for kept, expected, found in rules:
        if not kept:
            raise ShapeError(f"expected {expected} for a TMA descriptor, found {found}: choose another tile or layout")
