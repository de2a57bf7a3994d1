"""Launches: what is refused without a GPU, and on one (`-m gpu`) a kernel eager, captured, and from a fresh thread."""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.core", reason="cuda-core is for Linux")

from cuda.bindings import driver
from nmoe.kernels.errors import KernelError, ShapeError, UnsupportedArchError
from nmoe.kernels.runtime import launch
from nmoe.kernels.runtime.cache import KernelCache
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.launch import CudaKernel, KernelLaunchError, TensorMap, compile_all, tensor_map

ARCHES = ("sm_90a", "sm_100a")

KERNELS = """
struct alignas(64) TensorMap { unsigned long long v[16]; };
struct Params { float* x; int n; };
struct TileParams { TensorMap map; float* out; int column; int row; };

extern "C" __global__ void twice(const __grid_constant__ Params p) {
  extern __shared__ float staged[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) {
    staged[threadIdx.x] = p.x[i];
    p.x[i] = staged[threadIdx.x] * 2;
  }
}

// Each thread writes a word of the kernel's own KiB and of the launch's last, and reads both from the other end.
extern "C" __global__ void reverse(const __grid_constant__ Params p) {
  extern __shared__ float staged[];
  __shared__ float own[256];
  int i = threadIdx.x, j = 255 - i;
  float* last = staged + (p.n - 256);
  own[i] = p.x[i];
  last[i] = p.x[i] + 1;
  __syncthreads();
  p.x[i] = own[j] * last[j];
}

// One thread fetches a tile of 8 rows of 4 fp32 by TMA, and all write it out.
extern "C" __global__ void tile(const __grid_constant__ TileParams p) {
  __shared__ alignas(128) float staged[32];
  __shared__ alignas(8) unsigned long long barrier;
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
  unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(staged));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(at) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&p.map), "r"(at), "r"(p.column), "r"(p.row)
        : "memory");
  }
  __syncthreads();
  unsigned done = 0;
  while (!done)
    asm volatile(
        "{\\n.reg .pred ready;\\nmbarrier.try_wait.parity.shared::cta.b64 ready, [%1], 0;\\n"
        "selp.u32 %0, 1, 0, ready;\\n}"
        : "=r"(done) : "r"(at) : "memory");
  p.out[threadIdx.x] = staged[threadIdx.x];
}
"""


class Params(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("n", ctypes.c_int))


class TileParams(ctypes.Structure):
    _fields_ = (("map", TensorMap), ("out", ctypes.c_void_p), ("column", ctypes.c_int), ("row", ctypes.c_int))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the sources; kernels are cached beside them."""
    cache = KernelCache(tmp_path / "kernels")
    monkeypatch.setattr("nmoe.kernels.runtime.launch.current_cache", lambda: cache)
    (tmp_path / "kernels.cu").write_text(KERNELS)
    return tmp_path


def kernel(folder: Path, entry: str, arches: tuple[str, ...] = ARCHES) -> CudaKernel:
    return CudaKernel(CudaSource(entry, "kernels.cu", entry, arches, folder=folder))


@pytest.fixture
def twice(folder: Path) -> CudaKernel:
    return kernel(folder, "twice")


def params_of(x: torch.Tensor) -> Params:
    return Params(x.data_ptr(), x.numel())


def run(twice: CudaKernel, x: torch.Tensor, shared_bytes: int = 1024, stream: int | None = None) -> None:
    twice.launch((-(-x.numel() // 256), 1, 1), 256, shared_bytes, params_of(x), stream)


class FakeDriver:
    """Notes the limits that a kernel is given. `before`: what happens within the first of those calls."""

    CUresult, CUfunction_attribute = driver.CUresult, driver.CUfunction_attribute

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        self.limits: list[int] = []
        self._before = before

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any]:
        before, self._before = self._before, None
        if before is not None:
            before()
        self.limits.append(value)
        return (driver.CUresult.CUDA_SUCCESS,)


@pytest.fixture
def loaded() -> launch._Loaded:
    """A kernel that no driver has seen."""
    loaded = object.__new__(launch._Loaded)
    vars(loaded).update(name="twice", device=0, function=None, shared_limit=0, _lock=threading.Lock())
    return loaded


def test_the_shared_memory_limit_is_never_lowered(loaded: launch._Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has read the old limit comes late: a lower one would refuse the launches of the one before."""
    fake = FakeDriver()
    monkeypatch.setattr(launch, "driver", fake)
    for shared_bytes in (1024, 200_000, 60_000, 200_000):
        loaded.raise_shared_limit(shared_bytes)
    assert loaded.shared_limit == 200_000
    assert fake.limits == [1024, 200_000]


def test_the_shared_memory_limit_is_raised_by_one_thread_at_a_time(
    loaded: launch._Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread asks for more while the driver is still setting the first limit."""
    other = threading.Thread(target=loaded.raise_shared_limit, args=(200_000,))

    def meanwhile() -> None:
        other.start()
        other.join(0.2)

    fake = FakeDriver(before=meanwhile)
    monkeypatch.setattr(launch, "driver", fake)
    loaded.raise_shared_limit(60_000)
    other.join()
    assert loaded.shared_limit == 200_000
    assert fake.limits[-1] == 200_000


@pytest.mark.parametrize("arch", ARCHES)
def test_compile_all_keeps_the_order(folder: Path, arch: str) -> None:
    sources = [kernel(folder, entry).source for entry in ("twice", "tile", "twice")]
    assert [k.resources.name for k in compile_all(sources, arch, threads=2)] == ["twice", "tile", "twice"]
    assert len(list((folder / "kernels" / arch).glob("*.cubin"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu_names_the_remedy(twice: CudaKernel) -> None:
    with pytest.raises(UnsupportedArchError, match=r"found none.*runtime\.kernels = 'reference'"):
        twice.launch((1, 1, 1), 256, 0, Params(0, 0))


def test_another_arch_is_refused_by_name(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("nmoe.kernels.runtime.launch.detect_arch", lambda device: "sm_80")
    with pytest.raises(UnsupportedArchError, match=r"sm_90a, sm_100a for kernel 'twice', found sm_80"):
        kernel(folder, "twice").load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": ()}, "1 to 5 dimensions"),
        ({"dims": (64, 0)}, "1 to 5 dimensions"),
        ({"strides_bytes": ()}, "strides of all dimensions but the innermost"),
        ({"strides_bytes": (120,)}, "strides of multiples of 16 bytes"),
        ({"box": (64,)}, "a box of 1 to 256"),
        ({"box": (64, 257)}, "a box of 1 to 256"),
        ({"box": (4, 8)}, "box rows of a multiple of 16 bytes"),
        ({"box": (128, 8)}, "at most 128 bytes if swizzled"),
        ({"tensor": torch.zeros(4096, dtype=torch.bfloat16)[1:]}, "multiple of 16 bytes"),
        ({"tensor": torch.zeros(4096, dtype=torch.complex64)}, "a dtype out of"),
    ],
)
def test_tiles_that_tma_cannot_describe_are_refused(change: dict, message: str) -> None:
    tiles = {
        "tensor": torch.zeros(8192, dtype=torch.bfloat16),
        "dims": (64, 128),
        "strides_bytes": (128,),
        "box": (64, 8),
        "swizzle_128b": True,
    }
    with pytest.raises(ShapeError, match=message):
        tensor_map(**tiles | change)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shared_bytes", [1024, 200_000], ids=["little shared memory", "more than 48 KiB"])
def test_eager(twice: CudaKernel, shared_bytes: int) -> None:
    x = torch.arange(1000.0, device="cuda")
    run(twice, x, shared_bytes)
    run(twice, x[100:200], shared_bytes)
    expected = torch.arange(1000.0) * 2
    expected[100:200] *= 2
    assert torch.equal(x.cpu(), expected)


def reversed_product(kernel: CudaKernel, shared_bytes: int) -> None:
    x = torch.arange(256.0, device="cuda")
    kernel.launch((1, 1, 1), 256, shared_bytes, Params(x.data_ptr(), shared_bytes // 4))
    expected = torch.arange(256.0).flip(0)
    assert torch.equal(x.cpu(), expected * (expected + 1)), shared_bytes


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("shared_bytes", [47 * 1024, 47 * 1024 + 4, 48 * 1024, 48 * 1024 + 4])
def test_shared_memory_about_48_kib(folder: Path, shared_bytes: int) -> None:
    """Of a launch; the kernel's own KiB counts too."""
    reversed_product(kernel(folder, "reverse"), shared_bytes)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_shared_memory_that_differs_between_launches(folder: Path) -> None:
    """From several threads at once, more and less of it: no launch takes another's limit away."""
    reverse, errors = kernel(folder, "reverse"), []

    def work(sizes: list[int]) -> None:
        try:
            for shared_bytes in sizes:
                reversed_product(reverse, shared_bytes)
        except BaseException as error:
            errors.append(error)

    sizes = [200_000, 1024, 60_000, 48 * 1024, 220_000]
    threads = [threading.Thread(target=work, args=(sizes[i:] + sizes[:i],)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_captured(twice: CudaKernel) -> None:
    """A replay runs the kernel with the parameters of its capture, whatever became of the struct."""
    twice.load()
    x = torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(twice, x)
        run(twice, x)
    assert torch.equal(x.cpu(), torch.ones(1000)), "captured, not run"
    for _ in range(3):
        graph.replay()
    assert torch.equal(x.cpu(), torch.full((1000,), 64.0))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_stream_is_torchs_or_the_one_that_is_named(twice: CudaKernel) -> None:
    """A stream that another holds up leaves x as it is until it is let go."""
    run(twice, torch.ones(1, device="cuda"))
    for named in (False, True):
        x, side = torch.ones(1000, device="cuda"), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            if not named:
                run(twice, x)
        if named:
            run(twice, x, stream=side.cuda_stream)
        assert torch.equal(x.cpu(), torch.ones(1000)), "on the held stream, not on the default one"
        side.synchronize()
        assert torch.equal(x.cpu(), torch.full((1000,), 2.0))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_from_a_thread_that_has_not_used_cuda(twice: CudaKernel) -> None:
    x = torch.ones(1000, device="cuda")
    run(twice, x)
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(twice, x)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not errors
    assert torch.equal(x.cpu(), torch.full((1000,), 4.0))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_refusals_are_typed(twice: CudaKernel) -> None:
    x = torch.ones(8, device="cuda")
    with pytest.raises(KernelLaunchError, match=r"'twice'.*CUDA_ERROR_INVALID_VALUE.*limits"):
        run(twice, x, 1 << 20)
    with pytest.raises(KernelLaunchError, match=r"4096 threads.*CUDA_ERROR_"):
        twice.launch((1, 1, 1), 4096, 0, params_of(x))
    with pytest.raises(KernelLaunchError, match="a struct of 16 bytes"):
        twice.launch((1, 1, 1), 256, 0, TileParams())
    run(twice, x)
    assert torch.equal(x.cpu(), torch.full((8,), 2.0)), "and the kernel still runs"
    assert issubclass(KernelLaunchError, KernelError)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("column", "row"), [(0, 0), (8, 16), (16, 28), (20, 30)])
def test_a_tile_by_tma(folder: Path, column: int, row: int) -> None:
    """Of a 30×20 view in rows of 24: what lies outside of the 30×20 reads as zero, though memory has other values."""
    x = torch.arange(1.0, 40 * 24 + 1, device="cuda").view(40, 24)
    out = torch.full((32,), -1.0, device="cuda")
    tiles = ((20, 30), (24 * 4,), (4, 8), False)
    described = tensor_map(x, *tiles)
    assert tensor_map(x, *tiles) is described
    kernel(folder, "tile").launch((1, 1, 1), 32, 0, TileParams(described, out.data_ptr(), column, row))
    inside = torch.zeros(48, 32)
    inside[:30, :20] = x.cpu()[:30, :20]
    assert torch.equal(out.cpu().view(8, 4), inside[row : row + 8, column : column + 4])


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_launch_takes_little_host_time(twice: CudaKernel) -> None:
    """Under 10 µs each in the best of many short rounds; the driver's queue holds a round."""
    x = torch.ones(8, device="cuda")
    params, seconds = params_of(x), []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            twice.launch((1, 1, 1), 32, 1024, params)
        seconds.append((time.perf_counter() - start) / 100)
    assert min(seconds) < 10e-6
