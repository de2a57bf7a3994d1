"""The kernel cache: what its keys depend on, and that no state of a folder keeps a kernel from running."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime import cache as cache_module
from nmoe.kernels.runtime.cache import KernelCache, default_cache_dir, kernel_key
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.nvrtc import KernelCompileError, compile_cubin

pytest.importorskip("cuda.core", reason="cuda-core is for Linux")
pytestmark = pytest.mark.filterwarnings("error")

INNER = "#pragma once\n#define SCALE 2\n"
OUTER = '#pragma once\n#include "inner.cuh"\nstruct Params { float* x; int n; };\n'
KERNEL = """
#if 0
#include "outer.cuh"
#endif
#include "outer.cuh"
#include "inner.cuh"
extern "C" __global__ void scale(const __grid_constant__ Params p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.x[i] *= SCALE + EXTRA;
}
"""


@pytest.fixture
def source(tmp_path: Path) -> CudaSource:
    folder = tmp_path / "cuda"
    folder.mkdir()
    for name, text in (("inner.cuh", INNER), ("outer.cuh", OUTER), ("scale.cu", KERNEL), ("other.cuh", "")):
        (folder / name).write_text(text)
    return CudaSource("scale", "scale.cu", "scale", ("sm_90a", "sm_100a"), (("EXTRA", 1),), folder)


class Compiles:
    """Counts compiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(cache_module, "compile_cubin", self)

    def __call__(self, source: CudaSource, arch: str):
        self.count += 1
        return compile_cubin(source, arch)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Compiles:
    return Compiles(monkeypatch)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_compiles_for_an_arch_that_is_not_here(source: CudaSource, arch: str) -> None:
    """Includes that `#if` leaves out, that come twice and that nest are as in C++."""
    compiled = compile_cubin(source, arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert f"'scale' for '{arch}'" in compiled.log


def test_a_hit_compiles_nothing(source: CudaSource, tmp_path: Path, compiles: Compiles) -> None:
    first = KernelCache(tmp_path / "kernels").get(source, "sm_90a")
    assert compiles.count == 1
    again = KernelCache(tmp_path / "kernels")
    second = again.get(source, "sm_90a")
    assert again.get(source, "sm_90a") is second
    assert compiles.count == 1
    assert (second.cubin, second.resources, second.path) == (first.cubin, first.resources, first.path)
    assert first.seconds > 0
    assert second.seconds == 0
    key = kernel_key(source, "sm_90a")
    assert first.path == tmp_path / "kernels" / "sm_90a" / f"scale-{key[:12]}.cubin"
    assert sorted(p.suffix for p in first.path.parent.iterdir()) == [".cubin", ".json"]


@pytest.mark.parametrize("file", ["scale.cu", "outer.cuh", "inner.cuh"])
def test_a_changed_file_changes_the_key(source: CudaSource, file: str) -> None:
    before = kernel_key(source, "sm_90a")
    path = source.folder / file
    path.write_text(path.read_text() + "// changed\n")
    assert kernel_key(source, "sm_90a") != before


def test_what_the_code_depends_on_changes_the_key_and_nothing_else(source: CudaSource, monkeypatch) -> None:
    keys = [
        kernel_key(source, "sm_90a"),
        kernel_key(source, "sm_100a"),
        kernel_key(replace(source, entry="other"), "sm_90a"),
        kernel_key(replace(source, defines=(("EXTRA", 2),)), "sm_90a"),
    ]
    (source.folder / "other.cuh").write_text("// not included\n")
    assert kernel_key(source, "sm_90a") == keys[0]
    assert kernel_key(replace(source, name="renamed"), "sm_90a") == keys[0]
    monkeypatch.setattr(cache_module, "nvrtc_version", lambda: "99.0")
    assert len({*keys, kernel_key(source, "sm_90a")}) == 5


@pytest.mark.parametrize(
    "damage", ["cut", "one bit", "empty", "json cut", "json of another key", "json of another form"]
)
def test_a_damaged_file_is_compiled_again(source: CudaSource, tmp_path: Path, compiles: Compiles, damage: str) -> None:
    good = KernelCache(tmp_path / "kernels").get(source, "sm_90a")
    cubin, described = good.path, good.path.with_suffix(".json")
    if damage == "cut":
        cubin.write_bytes(good.cubin[:-1])
    elif damage == "one bit":
        cubin.write_bytes(good.cubin[:999] + bytes([good.cubin[999] ^ 1]) + good.cubin[1000:])
    elif damage == "empty":
        cubin.write_bytes(b"")
    elif damage == "json cut":
        described.write_text(described.read_text()[:40])
    elif damage == "json of another key":
        described.write_text(described.read_text().replace(kernel_key(source, "sm_90a"), "0" * 64))
    else:
        described.write_text("[]")
    with pytest.warns(RuntimeWarning, match="compiled again"):
        found = KernelCache(tmp_path / "kernels").get(source, "sm_90a")
    assert found.cubin == good.cubin
    assert compiles.count == 2
    assert KernelCache(tmp_path / "kernels").get(source, "sm_90a").cubin == good.cubin, "and is whole again"
    assert compiles.count == 2


def test_a_folder_that_cannot_be_made_is_a_warning(source: CudaSource, tmp_path: Path, compiles: Compiles) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(tmp_path / "file" / "kernels")
    with pytest.warns(RuntimeWarning, match="NMOE_KERNEL_CACHE"):
        found = cache.get(source, "sm_90a")
    assert found.path is None
    assert cache.get(source, "sm_90a").cubin == found.cubin
    assert compiles.count == 1, "kept in memory"


def test_a_full_disk_is_a_warning_and_leaves_nothing(source: CudaSource, tmp_path: Path, monkeypatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        found = KernelCache(tmp_path / "kernels").get(source, "sm_90a")
    assert found.cubin.startswith(b"\x7fELF")
    assert not list((tmp_path / "kernels" / "sm_90a").iterdir())


def test_a_read_only_folder_is_read(source: CudaSource, tmp_path: Path, compiles: Compiles, monkeypatch) -> None:
    good = KernelCache(tmp_path / "kernels").get(source, "sm_90a")
    folders = [tmp_path / "kernels" / "sm_90a", tmp_path / "kernels"]
    for path in (*folders[0].iterdir(), *folders):
        path.chmod(0o555)
    monkeypatch.setattr(cache_module, "_write_whole", lambda *args: pytest.fail("nothing is written"))
    assert KernelCache(tmp_path / "kernels").get(source, "sm_90a").cubin == good.cubin
    assert compiles.count == 1
    for path in folders:
        path.chmod(0o755)


PROCESS = """
import sys, time
from pathlib import Path
from nmoe.kernels.runtime import cache
from nmoe.kernels.runtime.cuda_source import CudaSource

folder, ready, name, others = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
source = CudaSource("scale", "scale.cu", "scale", ("sm_90a",), (("EXTRA", 1),), folder)
compile_cubin = cache.compile_cubin

def together(*args):
    compiled = compile_cubin(*args)
    (ready / name).touch()
    end = time.monotonic() + 30
    while len(list(ready.iterdir())) < others and time.monotonic() < end:
        time.sleep(0.001)
    return compiled

cache.compile_cubin = together
found = cache.KernelCache(folder / "kernels").get(source, "sm_90a")
assert found.path is not None and found.seconds > 0
"""


def test_processes_that_compile_one_kernel_at_once_all_succeed(source: CudaSource, tmp_path: Path, compiles) -> None:
    """All have compiled before the first publishes."""
    ready = tmp_path / "ready"
    ready.mkdir()
    command = [sys.executable, "-W", "error", "-c", PROCESS, str(source.folder), str(ready)]
    processes = [subprocess.Popen([*command, str(i), "3"]) for i in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    folder = source.folder / "kernels"
    assert len(list((folder / "sm_90a").iterdir())) == 2, "one kernel, no temporary files"
    KernelCache(folder).get(source, "sm_90a")
    assert compiles.count == 0


def test_errors_name_the_kernel_the_arch_and_the_line(source: CudaSource) -> None:
    (source.folder / "inner.cuh").write_text("#pragma once\n\nint broken(;\n")
    with pytest.raises(KernelCompileError, match=r"'scale'.*sm_90a") as caught:
        compile_cubin(source, "sm_90a")
    assert "inner.cuh(3)" in caught.value.log
    (source.folder / "inner.cuh").unlink()
    with pytest.raises(KernelCompileError, match=r'outer\.cuh\(2\).*"inner\.cuh"'):
        compile_cubin(source, "sm_90a")
    with pytest.raises(KernelError, match=r"kernel 'scale'.*missing\.cu"):
        compile_cubin(replace(source, file="missing.cu"), "sm_90a")


def test_an_entry_that_is_not_there_is_named(source: CudaSource, tmp_path: Path) -> None:
    with pytest.raises(KernelCompileError, match=r"no entry turn, but \['scale'\]"):
        KernelCache(tmp_path / "kernels").get(replace(source, entry="turn"), "sm_90a")


def test_the_folder_is_chosen_in_one_place(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NMOE_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "nmoe" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "nmoe" / "kernels"
    monkeypatch.setenv("NMOE_KERNEL_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
    monkeypatch.setattr(cache_module, "_current", None)
    assert cache_module.current_cache().folder == tmp_path / "mine"
    assert cache_module.set_cache_dir(tmp_path / "ahead") is cache_module.current_cache()
    assert cache_module.current_cache().folder == tmp_path / "ahead"
