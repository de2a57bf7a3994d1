"""What cross-entropy does between its matrix products, in one read of the logits and one write of their gradient.

A row stays in the shared memory of a block, or of a cluster of blocks, between the pass that sums and the pass that
writes: 6 bytes a logit. Rows that do not fit, or do not start where bulk copies may, go to the Triton kernel: 10 bytes.

Shapes: C rows of a chunk, V vocabulary.
"""

import ctypes
from functools import lru_cache

import torch
from cuda.bindings import driver
from nmoe.kernels.native import cross_entropy_triton
from nmoe.kernels.native.cross_entropy_triton import check_rows
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, KernelLaunchError

_THREADS, _PER_LANE = 512, 4
_WIDTH = 4
"""Logits of a quad: 16 bytes."""
_MOST_QUADS = 13_504
"""Of a block: 216,064 bytes of the 232,448 that it may have; the rest is for barriers and sums."""
_DEFINES = (("THREADS", _THREADS), ("PER_LANE", _PER_LANE), ("MOST_QUADS", _MOST_QUADS))

_KERNELS = {
    cluster: CudaKernel(
        CudaSource(
            f"cross_entropy_{cluster}",
            "cross_entropy.cu",
            "cross_entropy",
            ("sm_90a", "sm_100a"),
            (("CLUSTER", cluster), *_DEFINES),
        )
    )
    for cluster in (1, 2, 4, 8)
}
SOURCES = tuple(kernel.source for kernel in _KERNELS.values())
"""Every compile of this module."""


class _CrossEntropyParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "target", "nll", "dlogits")),
        ("rows", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("quads", "slice")),
    )


def score_rows(
    logits_CV: torch.Tensor, target_C: torch.Tensor, nll_C: torch.Tensor, dlogits_CV: torch.Tensor | None
) -> None:
    """`-log softmax(logits)[target]` of each row, and its gradient; the loss is NaN where a logit is NaN or +inf.

    Where V is a multiple of 4 up to 432,128, and logits and dlogits start at multiples of 16 bytes, each logit is read
    once, a loss is the same bits with and without a gradient, and logits beyond 2.3e38 count as infinite. All else goes
    to `cross_entropy_triton.score_rows`, whose bits may differ.

    Args:
        logits_CV: fp32, contiguous; left as they are.
        target_C: int64 ids below V, contiguous, or -100; the loss of any other is NaN.
        nll_C: fp32, contiguous, written; 0 where the target is -100, whose logits are not read.
        dlogits_CV: None, or bf16, contiguous: softmax less one-hot is written, and 0 where the target is -100.

    Raises:
        ShapeError: a shape, dtype, device or layout is not as above.
        KernelLaunchError: the device has no room for the kernel.
    """
    check_rows(logits_CV, target_C, nll_C, dlogits_CV)
    rows, vocab = logits_CV.shape
    cluster = _cluster_for(vocab)
    starts = logits_CV.data_ptr() | (0 if dlogits_CV is None else dlogits_CV.data_ptr())
    if cluster is None or starts % 16 or not logits_CV.is_cuda:
        return cross_entropy_triton.score_rows(logits_CV, target_C, nll_C, dlogits_CV)
    if rows == 0:
        return
    quads = vocab // _WIDTH
    slice_quads = _slice_quads(quads, cluster)
    params = _CrossEntropyParams(
        logits=logits_CV.data_ptr(),
        target=target_C.data_ptr(),
        nll=nll_C.data_ptr(),
        dlogits=None if dlogits_CV is None else dlogits_CV.data_ptr(),
        rows=rows,
        quads=quads,
        slice=slice_quads,
    )
    shared_bytes = slice_quads * 16
    with torch.cuda.device(logits_CV.device):
        clusters = min(rows, _resident_clusters(logits_CV.get_device(), cluster, shared_bytes))
        _KERNELS[cluster].launch((clusters * cluster, 1, 1), _THREADS, shared_bytes, params)


def _cluster_for(vocab: int) -> int | None:
    """The fewest blocks that hold a row; None: no cluster does, or rows do not start at multiples of 16 bytes."""
    if vocab == 0 or vocab % _WIDTH:
        return None
    return next((cluster for cluster in _KERNELS if _slice_quads(vocab // _WIDTH, cluster) <= _MOST_QUADS), None)


def _slice_quads(quads: int, cluster: int) -> int:
    """Of a block: whole lines of memory, 512 bytes of logits."""
    return -(-quads // (cluster * 32)) * 32


@lru_cache(maxsize=256)
def _resident_clusters(device: int, cluster: int, shared_bytes: int) -> int:
    """As many as run at once: rows are dealt out in advance, and a cluster that came later would find its share undone.

    Clusters do not cross the borders of a GPC, whose blocks are not always a multiple of theirs: the driver knows.
    """
    loaded = _KERNELS[cluster].load(device)
    loaded.raise_shared_limit(shared_bytes)
    if cluster == 1:
        status, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(loaded.function, _THREADS, shared_bytes)
        count = blocks * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        dims = driver.CUlaunchAttribute()
        dims.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dims.value.clusterDim.x, dims.value.clusterDim.y, dims.value.clusterDim.z = cluster, 1, 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [dims], 1
        status, count = driver.cuOccupancyMaxActiveClusters(loaded.function, config)
    if status != driver.CUresult.CUDA_SUCCESS or count < 1:
        raise KernelLaunchError(
            f"expected cuda:{device} to have room for clusters of {cluster} blocks with {shared_bytes} B of shared "
            f"memory, found {status.name} and {count}: set runtime.kernels = 'reference'"
        )
    return int(count)
