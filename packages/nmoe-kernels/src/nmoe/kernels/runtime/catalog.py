"""Every kernel that the package ships, and the check that none is missing here."""

import ast
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.triton_aot import TritonKernel

# Modules of CUDA kernels, one a line: each has `SOURCES: tuple[CudaSource, ...]`.
_CUDA_MODULES: tuple[str, ...] = (
    "nmoe.kernels.native.adamw_cuda",
    "nmoe.kernels.native.attention_backward_cuda",
    "nmoe.kernels.native.attention_dkdv_cuda",
    "nmoe.kernels.native.attention_dq_cuda",
    "nmoe.kernels.native.attention_forward_cuda",
    "nmoe.kernels.native.attention_narrow_cuda",
    "nmoe.kernels.native.balance_cuda",
    "nmoe.kernels.native.combine_cuda",
    "nmoe.kernels.native.cross_entropy_cuda",
    "nmoe.kernels.native.exchange_cuda",
    "nmoe.kernels.native.gain_cuda",
    "nmoe.kernels.native.global_norm_cuda",
    "nmoe.kernels.native.grouped_gemm_cuda",
    "nmoe.kernels.native.muon_cuda",
    "nmoe.kernels.native.norm_backward_cuda",
    "nmoe.kernels.native.router_cuda",
    "nmoe.kernels.native.routing_cuda",
    "nmoe.kernels.native.split_cuda",
)

# Modules of Triton kernels, one a line: each has `TRITON_KERNELS: tuple[TritonKernel, ...]`.
_TRITON_MODULES: tuple[str, ...] = (
    "nmoe.kernels.native.attention_backward_triton",
    "nmoe.kernels.native.attention_window_triton",
    "nmoe.kernels.native.cross_entropy_triton",
    "nmoe.kernels.native.grouped_gemm_triton",
    "nmoe.kernels.native.mla_triton",
    "nmoe.kernels.native.newton_schulz_triton",
    "nmoe.kernels.native.norm_triton",
    "nmoe.kernels.native.qkv_triton",
    "nmoe.kernels.native.rope_triton",
    "nmoe.kernels.native.router_triton",
    "nmoe.kernels.native.swiglu_triton",
)

_PACKAGE = Path(__file__).parents[1]
_NOT_CODE = re.compile(r"/\*.*?\*/|//[^\n]*|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.DOTALL | re.MULTILINE)
_WORD_BEFORE = re.compile(r"(\w+)\s*(\()?")


def cuda_sources() -> tuple[CudaSource, ...]:
    """Every compile of a CUDA kernel.

    Raises:
        KernelError: two have one name.
    """
    sources = tuple(source for module in _CUDA_MODULES for source in import_module(module).SOURCES)
    _check_names([source.name for source in sources])
    return sources


def triton_kernels() -> tuple[TritonKernel, ...]:
    """Every compile of a Triton kernel, as launches on sizes of multiples of 16 specialise it.

    Raises:
        KernelError: two have one name.
    """
    kernels = tuple(kernel for module in _TRITON_MODULES for kernel in import_module(module).TRITON_KERNELS)
    _check_names([kernel.name for kernel in kernels])
    return kernels


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KernelError(f"expected one kernel of each name, found more of {', '.join(twice)}: rename them")


def unlisted_kernels(
    sources: Sequence[CudaSource], kernels: Sequence[TritonKernel], package: Path = _PACKAGE
) -> list[str]:
    """Kernels in the package's files that no entry covers, as `file: name`.

    A kernel is a `__global__` function of a `cuda/*.cu`, or a `triton.jit` function whose name ends in `_kernel`.
    """
    listed = {(source.file, source.entry) for source in sources}
    missing = [
        f"cuda/{path.name}: {entry}"
        for path in sorted((package / "cuda").glob("*.cu"))
        for entry in _cuda_entries(path.read_text(encoding="utf-8"))
        if (path.name, entry) not in listed
    ]
    functions = {(kernel.module, kernel.function) for kernel in kernels}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        module = ".".join(("nmoe", "kernels", *place.with_suffix("").parts))
        missing += [
            f"{place.as_posix()}: {name}"
            for name in _triton_functions(path.read_text(encoding="utf-8"))
            if (module, name) not in functions
        ]
    return missing


def _cuda_entries(text: str) -> Iterator[str]:
    """Names of `__global__` functions: what a parenthesis follows, after attributes (which begin with `__`)."""
    _, *declarations = re.split(r"\b__global__\b", _NOT_CODE.sub("", text))
    for declaration in declarations:
        at = 0
        while found := _WORD_BEFORE.search(declaration, at):
            at = found.end()
            if found[2] is None:
                continue
            if not found[1].startswith("__"):
                yield found[1]
                break
            at = _after_parenthesis(declaration, at)


def _after_parenthesis(text: str, at: int) -> int:
    """Where the parenthesis that opened before `at` is closed."""
    depth = 1
    while depth and at < len(text):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def _triton_functions(text: str) -> Iterator[str]:
    if "triton" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            if any(ast.unparse(d) in ("triton.jit", "jit") for d in decorators):
                yield node.name
