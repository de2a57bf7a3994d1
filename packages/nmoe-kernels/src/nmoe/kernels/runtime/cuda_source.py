"""What one CUDA compile is made of: a file of the package, macros, and one entry."""

import re
from dataclasses import dataclass
from pathlib import Path

from nmoe.kernels.errors import KernelError

PACKAGE_FOLDER = Path(__file__).parents[1] / "cuda"
"""Where the package's .cu and .cuh files are."""

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"[ \t]*#[ \t]*pragma[ \t]+once\b")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class CudaSource:
    """One compile: `entry` of `file`, with `defines` as -D macros.

    Files include one another by `#include "name.cuh"` and nothing else: NVRTC sees one text, so that a compile depends
    on no folder of the machine.
    """

    name: str
    """Of the kernel, unique in the package; part of a file's name in the cache."""
    file: str
    """In `folder`."""
    entry: str
    """An `extern "C" __global__` function with one parameter, a struct by value."""
    arches: tuple[str, ...]
    """What it is written for, such as `sm_90a`."""
    defines: tuple[tuple[str, int], ...] = ()
    """Macros and their values."""
    folder: Path = PACKAGE_FOLDER
    """Of `file` and of all that it includes."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise KernelError(
                f"expected a kernel's name of letters, digits, '_', '.' and '-', found {self.name!r}: rename it"
            )

    def text(self) -> str:
        """The source with the folder's includes in place, and `#line` marks that keep messages and profiles true.

        Raises:
            KernelError: the folder has no such file.
        """
        path = self.folder / self.file
        if not path.is_file():
            raise KernelError(
                f"expected the source of kernel '{self.name}' at {path}, found none: "
                "correct its CudaSource, or install nmoe-kernels again"
            )
        return "\n".join(_lines(path, ())) + "\n"


def _lines(path: Path, including: tuple[Path, ...]) -> list[str]:
    """A guard stands around each included file, as `#pragma once` would: Python does not know which `#if` are taken.

    An include that is not there stays as it is, for the compiler to report.
    """
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = _INCLUDE.match(line)
        target = path.parent / found[1] if found else None
        if target is not None and target.is_file():
            if target != path and target not in including:
                guard = "NMOE_INCLUDED_" + re.sub(r"\W", "_", target.name)
                inside = _lines(target, (*including, path))
                lines += [f"#ifndef {guard}", f"#define {guard}", *inside, "#endif"]
            lines.append(f'#line {number + 1} "{path.name}"')
        elif including and _PRAGMA_ONCE.match(line):
            lines.append("")
        else:
            lines.append(line)
    return lines
