"""What a compiled kernel takes of a GPU, read out of the cubin itself: no tool is needed, and any compiler's will do.

A cubin is an ELF file. Its `.nv.info` section is a list of attributes: a byte of format, a byte of kind, and a value of
two bytes, or with format 4 its length in two bytes and then the value. Registers and stack frames are pairs of a symbol
index and a number. The layout is the one that NVIDIA's `cuobjdump -elf` prints.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nmoe.kernels.errors import KernelError

_SIZED = 4
_FRAME_SIZE = 0x11
_REGISTER_COUNT = 0x2F
_FUNCTION, _GLOBAL_INFO = 2, ".nv.info"
_ENTRY = 0x10
_PTXAS = re.compile(
    r"Function properties for (\S+)\s*\n"
    r"[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


@dataclass(frozen=True)
class KernelResources:
    """Of one kernel."""

    name: str
    """The entry."""
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread, in local memory."""
    spill_store_bytes: int | None
    """That a thread's spilled registers take to store; None where the compiler's log was not kept."""
    spill_load_bytes: int | None
    """Likewise, to load."""
    shared_bytes: int
    """Static shared memory of a block, with the 1 KiB that sm_90 and later reserve where a kernel has any."""

    @property
    def spills(self) -> bool:
        """Whether registers are spilled; where the log was not kept, whether a thread has a stack frame at all."""
        if self.spill_store_bytes is None or self.spill_load_bytes is None:
            return self.stack_bytes > 0
        return self.spill_store_bytes + self.spill_load_bytes > 0


def kernel_resources(cubin: bytes) -> list[KernelResources]:
    """Resources of every kernel in a cubin, by name; spills are not written in one and stay None.

    Raises:
        KernelError: this is no cubin.
    """
    try:
        return _parse(cubin)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise KernelError(
            f"expected a cubin (64-bit ELF), found {len(cubin)} bytes that are none ({type(error).__name__}): "
            "compile the kernel again"
        ) from error


def with_spills(kernels: Sequence[KernelResources], log: str) -> list[KernelResources]:
    """Adds the spills that ptxas tells in its log (`-v`)."""
    told = {name: (int(stores), int(loads)) for name, _, stores, loads in _PTXAS.findall(log)}
    return [
        replace(kernel, spill_store_bytes=told[kernel.name][0], spill_load_bytes=told[kernel.name][1])
        if kernel.name in told
        else kernel
        for kernel in kernels
    ]


def _parse(cubin: bytes) -> list[KernelResources]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError
    table = struct.unpack_from("<Q", cubin, 40)[0]
    entry_bytes, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    # of a section: name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_bytes) for i in range(count)]
    names = [_string(cubin, sections[names_at][4], section[0]) for section in sections]
    by_name = dict(zip(names, sections, strict=True))

    symbols = by_name[".symtab"]
    strings_at = sections[symbols[6]][4]
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    entries = []
    function_names = {}
    for index in range(symbols[5] // 24):
        name, info, other, _ = struct.unpack_from("<IBBH", cubin, symbols[4] + index * 24)
        if info & 0xF == _FUNCTION:
            function_names[index] = _string(cubin, strings_at, name)
            if other & _ENTRY:
                entries.append(function_names[index])
    for kind, value in _attributes(cubin, by_name[_GLOBAL_INFO]):
        if kind in (_REGISTER_COUNT, _FRAME_SIZE):
            symbol, number = struct.unpack("<II", value)
            (registers if kind == _REGISTER_COUNT else frames)[function_names.get(symbol, "")] = number
    return [
        KernelResources(
            name,
            registers[name],
            frames.get(name, 0),
            None,
            None,
            by_name[f".nv.shared.{name}"][5] if f".nv.shared.{name}" in by_name else 0,
        )
        for name in sorted(entries)
    ]


def _attributes(cubin: bytes, section: tuple[int, ...]) -> Iterator[tuple[int, bytes]]:
    at, end = section[4], section[4] + section[5]
    while at < end:
        form, kind, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form == _SIZED:
            yield kind, cubin[at : at + size]
            at += size


def _string(cubin: bytes, table: int, at: int) -> str:
    start = table + at
    return cubin[start : cubin.index(b"\0", start)].decode()
