"""Symmetric memory of GPUs of one host: CUDA IPC, plain loads and stores over NVLink or PCIe, and no multicast."""

import ctypes
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cuda.bindings import driver
from nmoe.rdep.errors import RdepError, SymmetricMemoryError
from nmoe.rdep.symmetric import agree_on_size, all_or_none
from nmoe.rdep.world import World

_SUCCESS = driver.CUresult.CUDA_SUCCESS
_LAZY_PEER_ACCESS = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_PAGE_BYTES = 2 << 20  # the driver puts smaller allocations together in one page, and a handle shares the whole page
_CLOSE_S = 5.0


class IpcMemory:
    """`SymmetricMemory` on GPUs. Every buffer is a tensor of this rank's own device, whosever memory it is.

    Args:
        world: the ranks, all on one host, each with a GPU of its own.

    Raises:
        SymmetricMemoryError: on all ranks, if a GPU cannot write to another's memory; names the two.
        PeerTimeoutError: a rank did not come.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._device = world.device
        self._own: list[int] = []
        self._peers: list[int] = []
        self._closed = False
        self.allocated = 0
        torch.cuda.init()
        self._number = self._call(driver.cuDeviceGet(world.device.index), "to find its device")
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._number), "to enter its context")
        self._check_peers()

    def allocate(self, nbytes: int) -> tuple[torch.Tensor, ...]:
        """See `SymmetricMemory.allocate`. Not during a CUDA graph's capture."""
        if self._closed:
            raise SymmetricMemoryError("expected open IPC memory, found it closed: allocate before `close`")
        world = self._world
        agree_on_size(world, nbytes)
        pointers: list[int] = []

        def create() -> bytes:
            return self._create(nbytes)

        def map_all() -> bytes:
            pointers.extend(
                self._own[-1] if rank == world.rank else self._open(rank, handle) for rank, handle in enumerate(handles)
            )
            return b""

        with self._in_context():
            handles = all_or_none(world, "IPC memory's handles", create)
            all_or_none(world, "IPC memory's mappings", map_all)
        self.allocated += nbytes
        return tuple(_tensor(pointer, nbytes, self._device) for pointer in pointers)

    def close(self) -> None:
        """See `SymmetricMemory.close`. Waits some seconds for the other ranks, so that none writes to what is gone.

        If one does not come, or this GPU does not come to an end of its work, the buffers stay until the process ends:
        what made it so is the error to tell.
        """
        if self._closed:
            return
        self._closed = True
        if not self._comes_to_an_end():
            return
        with self._in_context():
            for pointer in self._peers:
                self._call(driver.cuIpcCloseMemHandle(pointer), "to unmap a buffer")
            try:
                self._world.share("IPC memory's end", b"", _CLOSE_S)
            except RdepError:  # they are gone: the memory goes with this process
                return
            for pointer in self._own:
                self._call(driver.cuMemFree(pointer), "to free its buffer")
        self._call(driver.cuDevicePrimaryCtxRelease(self._number), "to leave its context")

    def _comes_to_an_end(self) -> bool:
        """Within seconds: a GPU that waits for a lost rank, or is broken, is not waited for."""
        stream, deadline = torch.cuda.current_stream(self._device), time.monotonic() + _CLOSE_S
        try:
            while not stream.query():
                if time.monotonic() > deadline:
                    return False
                time.sleep(1e-3)
        except RuntimeError:
            return False
        return True

    def _create(self, nbytes: int) -> bytes:
        """A zeroed buffer of this rank's; its handle."""
        padded = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
        pointer = int(self._call(driver.cuMemAlloc(padded), f"to have {padded} bytes free for all ranks to write to"))
        self._own.append(pointer)
        self._call(driver.cuMemsetD8(pointer, 0, padded), "to clear its buffer")
        # Peers may write as soon as they have the handle: not before the zeros.
        self._call(driver.cuCtxSynchronize(), "to clear its buffer")
        handle = self._call(driver.cuIpcGetMemHandle(pointer), "to share a buffer")
        return ctypes.string_at(int(handle.getPtr()), _HANDLE_BYTES)

    def _open(self, rank: int, handle_bytes: bytes) -> int:
        """Maps a peer's buffer; where it is here."""
        handle = driver.CUipcMemHandle()
        ctypes.memmove(int(handle.getPtr()), handle_bytes, _HANDLE_BYTES)
        opened = driver.cuIpcOpenMemHandle(handle, int(_LAZY_PEER_ACCESS))
        pointer = int(self._call(opened, f"to map the buffer of rank {rank}"))
        self._peers.append(pointer)
        return pointer

    def _check_peers(self) -> None:
        """Every rank checks its own GPU against all others: together, all pairs in both directions."""
        world = self._world
        seen = {_uuid(index): index for index in range(torch.cuda.device_count())}
        own = {"device": str(self._device), "uuid": _uuid(self._device.index)}
        gpus = [json.loads(value) for value in world.share("IPC memory's GPUs", json.dumps(own).encode())]

        def check() -> bytes:
            for rank, gpu in enumerate(gpus):
                if rank != world.rank:
                    peer = None if gpu["uuid"] == own["uuid"] else seen.get(gpu["uuid"])
                    self._check_peer(f"{gpu['device']} ({gpu['uuid']}) of rank {rank}", peer)
            return b""

        all_or_none(world, "IPC memory's peer access", check)

    def _check_peer(self, told: str, peer: int | None) -> None:
        own = f"{self._device} ({_uuid(self._device.index)})"
        if peer is None:
            raise SymmetricMemoryError(
                f"expected {own} to see {told} as another GPU of its host, found that it is the same or does not: give "
                "each rank a GPU of its own and all ranks the same CUDA_VISIBLE_DEVICES, on one host"
            )
        number = self._call(driver.cuDeviceGet(peer), "to find its peer")
        if not self._call(driver.cuDeviceCanAccessPeer(self._number, number), "to ask for access to its peer"):
            raise SymmetricMemoryError(
                f"expected {own} to write to the memory of {told}, found no peer access between the two: use GPUs that "
                "NVLink joins, or a machine that lets PCIe peers through (nvidia-smi topo -p2p w)"
            )

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        """The device's primary context, which is torch's too: threads that have not used CUDA yet have none."""
        self._call(driver.cuCtxPushCurrent(self._context), "to enter its context")
        try:
            yield
        finally:
            self._call(driver.cuCtxPopCurrent(), "to leave its context")

    def _call(self, result: tuple[Any, ...], what: str) -> Any:
        status, *values = result
        if status != _SUCCESS:
            free = f"; {torch.cuda.mem_get_info(self._device)[0]} bytes are free" if _is_memory(status) else ""
            raise SymmetricMemoryError(
                f"expected {self._device} {what}, found {driver.CUresult(status).name}{free}: "
                + (
                    "lower train.micro_batch_size, train.seq_len or rdep.capacity_factor"
                    if _is_memory(status)
                    else "run all ranks in one container, with --ipc=host and CUDA IPC; errors of earlier kernels may "
                    "show here"
                )
            )
        return values[0] if values else None


def _is_memory(status: Any) -> bool:
    return status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _tensor(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 (nbytes,) over memory that the tensor does not own.

    Not through `__cuda_array_interface__`: torch would take a peer's buffer for a tensor of the peer's device, where a
    kernel on it would open a context of its own.
    """
    storage = torch._C._construct_storage_from_data_pointer(pointer, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
