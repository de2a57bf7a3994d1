"""Compiles every kernel ahead, without a GPU: `python -m nmoe.kernels.compile --arch sm_90a [--out DIR]`.

Exit code 0: all compiled, none spills, none is missing in the catalog. 1: one of these fails. 2: wrong arguments.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime import catalog
from nmoe.kernels.runtime.cache import KernelCache, default_cache_dir
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.resources import KernelResources
from nmoe.kernels.runtime.triton_aot import TritonKernel, compile_triton


@dataclass(frozen=True)
class _Row:
    name: str
    resources: KernelResources | None
    """None: it did not compile."""
    seconds: float
    errors: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.kernels.compile", description="Compile every kernel ahead.")
    parser.add_argument("--arch", required=True, help="target, such as sm_90a")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the compiled kernels (default: this user's kernel cache)"
    )
    args = parser.parse_args(argv)

    sources, kernels = catalog.cuda_sources(), catalog.triton_kernels()
    known = sorted({a for s in sources for a in s.arches} | {a for k in kernels for a in k.arches})
    if args.arch not in known:
        parser.error(f"expected an arch that kernels are written for ({', '.join(known)}), found '{args.arch}'")

    cache = KernelCache(default_cache_dir() if args.out is None else args.out)
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        cuda = [pool.submit(_cuda_row, cache, s, args.arch) for s in sources if args.arch in s.arches]
    triton_cache = None if args.out is None else args.out.absolute() / "triton"
    rows = [future.result() for future in cuda]
    rows += [_triton_row(k, args.arch, triton_cache) for k in kernels if args.arch in k.arches]
    seconds = time.perf_counter() - start

    errors = [error for row in rows for error in row.errors]
    errors += [
        f"{kernel} is not in the catalog: add its CudaSource or TritonKernel to runtime/catalog.py, or remove it"
        for kernel in catalog.unlisted_kernels(sources, kernels)
    ]
    print(_table(rows, args.arch))
    print(f"{len(rows)} kernels for {args.arch} in {seconds:.1f} s, {len(errors)} errors; CUDA in {cache.folder}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


def _cuda_row(cache: KernelCache, source: CudaSource, arch: str) -> _Row:
    try:
        kernel = cache.get(source, arch)
    except KernelError as error:
        return _Row(source.name, None, 0.0, (str(error),))
    errors = _spills(source.name, kernel.resources)
    if kernel.path is None:
        errors += (f"kernel '{source.name}' was not written to {cache.folder}: name a writable folder with --out",)
    return _Row(source.name, kernel.resources, kernel.seconds, errors)


def _triton_row(kernel: TritonKernel, arch: str, cache: Path | None) -> _Row:
    try:
        compiled = compile_triton(kernel, arch, cache)
    except KernelError as error:
        return _Row(kernel.name, None, 0.0, (str(error),))
    return _Row(kernel.name, compiled.resources, compiled.seconds, _spills(kernel.name, compiled.resources))


def _spills(name: str, resources: KernelResources) -> tuple[str, ...]:
    if not resources.spills:
        return ()
    return (
        f"kernel '{name}' spills ({_spilled(resources)} B a thread at {resources.registers} registers): "
        "give it a smaller tile or fewer threads a block",
    )


def _spilled(resources: KernelResources) -> str:
    if resources.spill_store_bytes is None:
        return f"{resources.stack_bytes} local"
    return f"{resources.spill_store_bytes}/{resources.spill_load_bytes}"


def _table(rows: Sequence[_Row], arch: str) -> str:
    lines = [("kernel", "arch", "registers", "spills B", "shared B", "seconds")]
    for row in rows:
        found = row.resources
        if found is None:
            lines.append((row.name, arch, "failed", "", "", ""))
        else:
            seconds = f"{row.seconds:.2f}" if row.seconds else "cached"
            lines.append((row.name, arch, str(found.registers), _spilled(found), str(found.shared_bytes), seconds))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    raise SystemExit(main())
