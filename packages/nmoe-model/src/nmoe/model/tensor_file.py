"""Writing safetensors files in one pass: tensors are streamed, hashed and synced, without a copy of the file in memory.

The `safetensors` package reads these files. Its writer is not used because it gives no digest: 88 GB would be read back
once more only to hash them.
"""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from nmoe.model.errors import InvalidEntryError

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the dtypes in a safetensors header."""

_CHUNK = 8 << 20
"""Bytes written and hashed at a time: large beside the call's cost, small beside memory."""
_IO_THREADS = min(4, os.cpu_count() or 1)
"""Files written or hashed at a time: one core hashes slower than a good disk writes."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorFile:
    """One planned safetensors file."""

    name: str
    """Its file name."""
    header: bytes
    """Its first bytes: the header's length and the header."""
    members: tuple[str, ...]
    """Its tensors' names, in the order of their data."""
    size: int
    """Its size in bytes."""


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raises InvalidEntryError for a tensor whose dtype or layout is none that safetensors can hold."""
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise InvalidEntryError(
            f"tensor {name!r}: expected a dense tensor of a dtype among {', '.join(DTYPES.values())}, "
            f"found {tensor.layout}, {tensor.dtype}: convert it first"
        )


def plan_files(tensors: Mapping[str, torch.Tensor], max_file_bytes: int = 2 << 30) -> list[TensorFile]:
    """Distributes tensors over files `tensors-00001.safetensors`, … of at most `max_file_bytes` of data each.

    A tensor larger than that has a file of its own. The plan depends on names, dtypes and shapes alone.

    Raises:
        InvalidEntryError: a tensor's name, dtype or layout is none that safetensors can hold.
    """
    for name, tensor in tensors.items():
        if name == "__metadata__":
            raise InvalidEntryError("tensor '__metadata__': safetensors keeps this name for itself: rename the tensor")
        check_dense(name, tensor)
    # Wide elements first: every tensor is then aligned to its element size, since safetensors allows no gaps.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    groups: list[list[str]] = []
    room = 0
    for name in order:
        size = tensors[name].nbytes
        if not groups or size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    return [_plan_file(f"tensors-{index:05}.safetensors", group, tensors) for index, group in enumerate(groups, 1)]


def write_files(
    folder: Path, plans: Sequence[TensorFile], tensors: Mapping[str, torch.Tensor], texts: Mapping[str, bytes]
) -> dict[str, dict[str, Any]]:
    """Writes planned files and texts to `folder`, several at a time, each synced; returns their entries in a manifest.

    Raises:
        InvalidEntryError: a tensor is not on the CPU.
        OSError: the disk is full or fails.
    """
    tasks: dict[str, Callable[[], str]] = {
        plan.name: partial(write_tensors, folder / plan.name, plan, tensors) for plan in plans
    }
    tasks |= {name: partial(write_bytes, folder / name, text) for name, text in texts.items()}
    sizes = {plan.name: plan.size for plan in plans} | {name: len(text) for name, text in texts.items()}
    digests = run_parallel(list(tasks.values()))
    return {name: {"bytes": sizes[name], "sha256": digest} for name, digest in zip(tasks, digests, strict=True)}


def write_tensors(path: Path, plan: TensorFile, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes one planned file at `path`, synced to the disk, and returns its SHA-256.

    Raises:
        InvalidEntryError: a tensor is not on the CPU.
        OSError: the disk is full or fails.
    """
    digest = hashlib.sha256(plan.header)
    with open(path, "xb") as file:
        file.write(plan.header)
        for name in plan.members:
            tensor = tensors[name].detach()
            if tensor.device.type != "cpu":
                raise InvalidEntryError(
                    f"tensor {name!r}: expected it on the CPU, found {tensor.device}: copy it first"
                )
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> str:
    """Writes a new file at `path`, synced to the disk, and returns its SHA-256."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def run_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Runs tasks on a few threads and returns their results in order.

    After a failure no further task is begun; the failure of the earliest task is raised once all threads have ended.
    """
    # Plain threads: concurrent.futures refuses work once the main thread has ended, which is when the last checkpoint
    # of a failed run may still be under way.
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}
    todo = iter(range(len(tasks)))
    handing_out = threading.Lock()

    def work() -> None:
        while True:
            with handing_out:
                index = None if failures else next(todo, None)
            if index is None:
                return
            try:
                results[index] = tasks[index]()
            except BaseException as error:
                failures[index] = error

    threads = [threading.Thread(target=work, name="nmoe-io") for _ in range(min(_IO_THREADS, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interruption:
        failures[-1] = interruption
        for thread in threads:
            thread.join()
    if failures:
        raise failures[min(failures)]
    return [results[index] for index in range(len(tasks))]


def _plan_file(file: str, names: list[str], tensors: Mapping[str, torch.Tensor]) -> TensorFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return TensorFile(name=file, header=header, members=tuple(names), size=len(header) + offset)
