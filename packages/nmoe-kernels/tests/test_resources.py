"""Registers, stack, spills and shared memory read out of cubins, against NVIDIA's own tool where Triton brings it."""

import re
import subprocess
from pathlib import Path

import pytest
from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime.catalog import triton_kernels
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.nvrtc import Compiled, compile_cubin
from nmoe.kernels.runtime.resources import KernelResources, kernel_resources, with_spills
from nmoe.kernels.runtime.triton_aot import compile_triton

pytest.importorskip("cuda.core", reason="cuda-core is for Linux")
ARCHES = ("sm_90a", "sm_100a")

KERNELS = """
struct Params { float* x; int n; };
extern "C" __global__ void small(const __grid_constant__ Params p) { p.x[threadIdx.x] *= 2; }
extern "C" __global__ void shared(const __grid_constant__ Params p) {
  __shared__ float s[640];
  s[threadIdx.x] = p.x[threadIdx.x];
  __syncthreads();
  p.x[threadIdx.x] = s[p.n - threadIdx.x];
}
extern "C" __global__ void array(const __grid_constant__ Params p) {
  float a[64];
  for (int i = 0; i < 64; i++) a[i] = p.x[i];
  for (int i = 0; i < p.n; i++) a[(i * 7) & p.n] += a[i & 63];
  p.x[threadIdx.x] = a[p.n];
}
extern "C" __global__ void __launch_bounds__(1024) spills(const __grid_constant__ Params p) {
  float a[160];
#pragma unroll
  for (int i = 0; i < 160; i++) a[i] = p.x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 160; i++) p.x[i * 1024 + threadIdx.x] = a[i] * a[(i * 7 + 3) % 160];
}
"""


@pytest.fixture(scope="module", params=ARCHES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "kernels.cu").write_text(KERNELS)
    return compile_cubin(CudaSource("kernels", "kernels.cu", "small", ARCHES, folder=folder), request.param)


def told_by_cuobjdump(cubin: bytes, folder: Path) -> dict[str, tuple[int, int, int]]:
    """(registers, stack, shared memory) by kernel."""
    triton = pytest.importorskip("triton", reason="its wheel has cuobjdump")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip(f"no {tool}")
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: (int(a), int(b), int(c)) for name, a, b, c in found}


def as_told(kernels: list[KernelResources]) -> dict[str, tuple[int, int, int]]:
    return {k.name: (k.registers, k.stack_bytes, k.shared_bytes) for k in kernels}


def test_nvrtc_cubins_as_cuobjdump_tells(compiled: Compiled, tmp_path: Path) -> None:
    found = as_told(kernel_resources(compiled.cubin))
    assert list(found) == ["array", "shared", "small", "spills"]
    assert found == told_by_cuobjdump(compiled.cubin, tmp_path)


@pytest.mark.parametrize("arch", ARCHES)
def test_triton_cubins_as_cuobjdump_tells(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    cubin = compile_triton(triton_kernels()[0], arch, tmp_path / "triton").cubin
    assert as_told(kernel_resources(cubin)) == told_by_cuobjdump(cubin, tmp_path)


def test_spills_come_from_the_log_and_arrays_are_none(compiled: Compiled) -> None:
    """An array that is indexed at run time has a stack frame, which only the log tells from spilled registers."""
    bare = {kernel.name: kernel for kernel in kernel_resources(compiled.cubin)}
    assert {name for name, kernel in bare.items() if kernel.spills} == {"array", "spills"}
    known = {kernel.name: kernel for kernel in with_spills(list(bare.values()), compiled.log)}
    assert {name for name, kernel in known.items() if kernel.spills} == {"spills"}
    assert known["array"].stack_bytes == 256
    assert known["array"].spill_store_bytes == known["array"].spill_load_bytes == 0
    assert known["spills"].spill_store_bytes > 160
    assert known["spills"].registers == 64, "65,536 registers for 1,024 threads"
    assert known["shared"].shared_bytes == 640 * 4 + 1024


@pytest.mark.parametrize("cubin", [b"", b"\x7fELF", b"\x7fELF\x02" + bytes(200), b"PTX" * 100])
def test_what_is_no_cubin_is_refused(cubin: bytes) -> None:
    with pytest.raises(KernelError, match="expected a cubin"):
        kernel_resources(cubin)


def test_a_cut_cubin_is_refused(compiled: Compiled) -> None:
    with pytest.raises(KernelError, match="expected a cubin"):
        kernel_resources(compiled.cubin[: len(compiled.cubin) // 2])
