"""Triton kernels compiled ahead, for a GPU that need not be here."""

import re
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime.nvrtc import KernelCompileError
from nmoe.kernels.runtime.resources import KernelResources, kernel_resources


@dataclass(frozen=True)
class TritonKernel:
    """One compile of a Triton function, as a launch specialises it."""

    name: str
    """Of the kernel, unique in the package."""
    module: str
    """That has the function."""
    function: str
    """Decorated with `triton.jit`."""
    arches: tuple[str, ...]
    """What it is written for, such as `sm_90a`."""
    signature: tuple[tuple[str, str], ...]
    """Arguments in order, with Triton's name of each type (`*fp32`, `i32`), but constants."""
    constants: tuple[tuple[str, int | None], ...] = ()
    """`tl.constexpr` arguments, which come last."""
    aligned: tuple[str, ...] = ()
    """Arguments whose address or value is a multiple of 16."""
    options: tuple[tuple[str, int], ...] = ()
    """Of the launch, such as `num_warps`."""


@dataclass(frozen=True)
class TritonCompiled:
    """What one compile gave."""

    cubin: bytes
    resources: KernelResources
    """With all shared memory, dynamic too: Triton fixes it in the compile."""
    seconds: float


def compile_triton(kernel: TritonKernel, arch: str, cache: Path | None = None) -> TritonCompiled:
    """Compiles for one arch.

    Args:
        kernel: what is compiled.
        arch: target.
        cache: Triton's own cache folder; None: where Triton keeps it.

    Raises:
        KernelCompileError: the kernel has errors, or its entry in the catalog does not fit it.
        KernelError: Triton interprets kernels instead (TRITON_INTERPRET).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(kernel.module), kernel.function)
    if not isinstance(function, triton.JITFunction):
        raise KernelError(
            f"expected a compiled Triton function for kernel '{kernel.name}', found {type(function).__name__}: "
            "unset TRITON_INTERPRET"
        )
    constants = dict(kernel.constants)
    signature = dict(kernel.signature) | dict.fromkeys(constants, "constexpr")
    aligned = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    target = GPUTarget("cuda", int("".join(re.findall(r"\d", arch))), 32)
    start = time.perf_counter()
    try:
        with triton.knobs.cache.scope():
            if cache is not None:
                triton.knobs.cache.dir = str(cache)
            source = ASTSource(function, signature, constants, aligned)
            compiled = triton.compile(source, target=target, options=dict(kernel.options))
    except Exception as error:  # Triton's errors have no common base
        raise KernelCompileError(kernel.name, arch, f"{type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    cubin = compiled.asm["cubin"]
    (resources,) = kernel_resources(cubin)
    shared = resources.shared_bytes + compiled.metadata.shared
    return TritonCompiled(cubin, replace(resources, shared_bytes=shared), seconds)
