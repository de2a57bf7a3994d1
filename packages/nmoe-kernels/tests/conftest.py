"""What the kernel tests share: one thread, a fixed seed, a tier, a GPU, CUDA graphs, recorders of what an op allocates
and of how a kernel is launched, kernels compiled ahead, and Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.ops import Ops, select_ops
from nmoe.kernels.runtime.cache import KernelCache
from nmoe.kernels.runtime.triton_aot import TritonCompiled, TritonKernel, compile_triton
from torch.utils._python_dispatch import TorchDispatchMode


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` needs no `skipif` of its own."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, found none")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ops() -> Ops:
    return select_ops("reference", "cpu")


@pytest.fixture
def gpu() -> str:
    """A device that the native tier has kernels for, in a test marked `gpu`."""
    arch = detect_arch("cuda")
    if arch not in NATIVE_ARCHES:
        pytest.skip(f"expected one of {', '.join(NATIVE_ARCHES)}, found {arch}")
    return "cuda"


Output = TypeVar("Output")


@pytest.fixture
def capture() -> Callable[[Callable[[], Output]], tuple[torch.cuda.CUDAGraph, Output]]:
    """Runs a step once, on another stream, since a capture neither compiles nor loads a kernel; then captures it.
    Returns the graph, and the step's output, which only a replay fills."""

    def run(step: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
        return graph, output

    return run


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an op returns, and the op's name."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.ops: list[str] = []

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        self.shapes += [tuple(x.shape) for x in _tensors(out)]
        return out


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _tensors(item)


@pytest.fixture
def allocations() -> Allocations:
    """Used as a context manager; see `Allocations`."""
    return Allocations()


class Launches:
    """Stands for a Triton kernel and notes how it is launched."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] | None = None
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        self.grid = grid
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, str], Launches]:
    """Puts a new `Launches` in the place of a module's kernel, until the test ends."""

    def replace(module: ModuleType, kernel: str) -> Launches:
        launches = Launches()
        monkeypatch.setattr(module, kernel, launches)
        return launches

    return replace


class Ahead:
    """Kernels compiled ahead. One that several tests ask for is compiled once: the caches' keys are all that the code
    depends on, compilers included."""

    def __init__(self, folder: Path) -> None:
        self.cuda = KernelCache(folder / "cuda")
        self._triton = folder / "triton"

    def triton(self, kernel: TritonKernel, arch: str) -> TritonCompiled:
        return compile_triton(kernel, arch, self._triton)

    def ptx(self, kernel: TritonKernel, compiled: TritonCompiled) -> str:
        """What the cubin was made of."""
        for cubin in self._triton.glob(f"*/{kernel.function}.cubin"):
            if cubin.read_bytes() == compiled.cubin:
                return cubin.with_suffix(".ptx").read_text()
        raise FileNotFoundError(f"PTX of {kernel.name} in {self._triton}")


@pytest.fixture(scope="session")
def ahead(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ahead:
    """All processes of a run share its folder, and so do the runs to come, while pytest has a cache."""
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    return Ahead(tmp_path_factory.mktemp("ahead") if cache is None else cache.mkdir("kernels"))


Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, dict[str, Arrays]], Arrays]]:
    """Runs cases by one of the `*_interpreted.py`, in a process of its own; returns results by `<case>/<name>`."""
    folder = Path(__file__).parent
    server = subprocess.Popen(
        [sys.executable, str(folder / "interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(script: str, cases: dict[str, Arrays]) -> Arrays:
        assert server.stdin is not None
        assert server.stdout is not None
        own = tmp_path_factory.mktemp("interpreted")
        given, results, log = (own / name for name in ("cases.npz", "results.npz", "log"))
        np.savez(given, **{f"{case}/{name}": array for case, arrays in cases.items() for name, array in arrays.items()})
        print(folder / script, given, results, log, sep="\t", file=server.stdin, flush=True)
        code = server.stdout.readline()
        assert code == "0\n", log.read_text()
        return dict(np.load(results, allow_pickle=False))

    yield run
    server.communicate()  # whose input ends
