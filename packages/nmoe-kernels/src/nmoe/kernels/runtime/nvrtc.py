"""CUDA C++ to machine code, in this process: NVRTC through cuda-core. No GPU and no CUDA toolkit are needed."""

import io
import threading
from dataclasses import dataclass

from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime.cuda_source import CudaSource

OPTIONS = ("std=c++17", "lineinfo", "ptxas=-v")
"""What every compile has beside its arch and macros; part of the cache's key."""


_IMPORTING = threading.Lock()  # two threads that import cuda-core at once find it half imported


class KernelCompileError(KernelError):
    """A kernel does not compile.

    Attributes:
        kernel: its name.
        arch: the target.
        log: what the compiler said.
    """

    def __init__(self, kernel: str, arch: str, log: str) -> None:
        super().__init__(f"expected kernel '{kernel}' to compile for {arch}, found errors: correct its source.\n{log}")
        self.kernel, self.arch, self.log = kernel, arch, log


@dataclass(frozen=True)
class Compiled:
    """Machine code, and the compiler's log with what ptxas says of registers and spills."""

    cubin: bytes
    log: str


def compile_cubin(source: CudaSource, arch: str) -> Compiled:
    """Compiles for one arch. Threads may compile at once: NVRTC runs without the interpreter's lock.

    Raises:
        KernelCompileError: the source has errors, or NVRTC does not know the arch.
    """
    with _IMPORTING:
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=source.file,
        arch=arch,
        std="c++17",
        lineinfo=True,
        ptxas_options=["-v"],
        define_macro=[(name, str(value)) for name, value in source.defines] or None,
    )
    log = io.StringIO()
    try:
        program = Program(source.text(), "c++", options)
        try:
            code = bytes(program.compile("cubin", logs=log).code)
        finally:
            program.close()
    except KernelError:
        raise
    except Exception as error:  # cuda-core's own error types are not public
        raise KernelCompileError(source.name, arch, f"{error}\n{log.getvalue()}".strip()) from error
    return Compiled(code, log.getvalue().strip())


def nvrtc_version() -> str:
    """`major.minor` of the NVRTC that is loaded.

    Raises:
        KernelError: NVRTC does not answer.
    """
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"expected NVRTC's version, found {status.name}: install nvidia-cuda-nvrtc again")
    return f"{major}.{minor}"
