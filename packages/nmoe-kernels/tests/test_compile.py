"""Every kernel that the package ships compiles ahead without spills, and the command says what does not."""

import re
from pathlib import Path
from typing import Any

import pytest
from nmoe.kernels.compile import main
from nmoe.kernels.errors import KernelError
from nmoe.kernels.runtime import catalog
from nmoe.kernels.runtime.cache import KernelCache
from nmoe.kernels.runtime.catalog import cuda_sources, triton_kernels, unlisted_kernels
from nmoe.kernels.runtime.cuda_source import CudaSource
from nmoe.kernels.runtime.triton_aot import TritonKernel, compile_triton

pytest.importorskip("cuda.core", reason="cuda-core is for Linux")
pytest.importorskip("triton", reason="Triton is for Linux")

ARCHES = ("sm_90a", "sm_100a")
FINE = 'extern "C" __global__ void fine(float* x) { x[threadIdx.x] *= 2; }\n'
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
  float a[160];
#pragma unroll
  for (int i = 0; i < 160; i++) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 160; i++) x[i * 1024 + threadIdx.x] = a[i] * a[(i * 7 + 3) % 160];
}
"""


@pytest.mark.parametrize(
    ("source", "arch"),
    [pytest.param(s, arch, id=f"{s.name}-{arch}") for s in cuda_sources() for arch in s.arches],
)
def test_every_cuda_kernel_compiles_without_spills(source: CudaSource, arch: str, ahead: Any) -> None:
    found = ahead.cuda.get(source, arch).resources
    assert found.name == source.entry
    assert 8 <= found.registers <= 255
    assert not found.spills, found


@pytest.mark.parametrize(
    ("kernel", "arch"),
    [pytest.param(k, arch, id=f"{k.name}-{arch}") for k in triton_kernels() for arch in k.arches],
)
def test_every_triton_kernel_compiles_without_spills(kernel: TritonKernel, arch: str, ahead: Any) -> None:
    compiled = ahead.triton(kernel, arch)
    assert compiled.resources.name == kernel.function
    assert 16 <= compiled.resources.registers <= 255
    assert not compiled.resources.spills


def test_no_kernel_is_unlisted() -> None:
    assert unlisted_kernels(cuda_sources(), triton_kernels()) == []


def make_package(folder: Path) -> Path:
    (folder / "cuda").mkdir(parents=True)
    (folder / "native").mkdir()
    (folder / "cuda" / "sums.cu").write_text(
        "// __global__ void in_a_comment(int x)\n#define NOT_CODE __global__ void in_a_macro(\n"
        'extern "C" __global__ void __launch_bounds__(MIN(256, 128), 1)\n#if CLUSTER > 1\n'
        "    __cluster_dims__(CLUSTER, 1, 1)\n#endif\n        sum_rows(const Params p) { work(p); }\n"
        'extern "C" __global__ void sum_columns(const Params p) {}\n'
    )
    (folder / "native" / "scan_triton.py").write_text(
        "import triton\n@triton.jit\ndef _helper(x):\n    pass\n@triton.jit\ndef _scan_kernel(x):\n    pass\n"
        "@triton.jit(noinline=True)\ndef _other_kernel(x):\n    pass\ndef run_kernel():\n    pass\n"
    )
    return folder


def test_unlisted_kernels_are_found_by_file_and_name(tmp_path: Path) -> None:
    package = make_package(tmp_path)
    assert unlisted_kernels((), (), package) == [
        "cuda/sums.cu: sum_rows",
        "cuda/sums.cu: sum_columns",
        "native/scan_triton.py: _scan_kernel",
        "native/scan_triton.py: _other_kernel",
    ]
    source = CudaSource("sums", "sums.cu", "sum_rows", ARCHES)
    kernel = TritonKernel("scan", "nmoe.kernels.native.scan_triton", "_scan_kernel", ARCHES, ())
    assert unlisted_kernels((source,), (kernel,), package) == [
        "cuda/sums.cu: sum_columns",
        "native/scan_triton.py: _other_kernel",
    ]


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CudaSource]:
    """What the command takes for the catalog: one fine kernel, and what a test adds."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    for name, text in (("fine", FINE), ("spills", SPILLS), ("broken", FINE.replace("x[", "y["))):
        (folder / f"{name}.cu").write_text(text)
    sources = [CudaSource("fine", "fine.cu", "fine", ("sm_90a",), folder=folder)]
    monkeypatch.setattr(catalog, "cuda_sources", lambda: tuple(sources))
    monkeypatch.setattr(catalog, "triton_kernels", lambda: ())
    monkeypatch.setattr(catalog, "unlisted_kernels", lambda *args: [])
    return sources


def test_the_table(listed: list[CudaSource], tmp_path: Path, capsys) -> None:
    command = ["--arch", "sm_90a", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "arch", "registers", "spills", "B", "shared", "B", "seconds"]
    assert re.fullmatch(r"fine +sm_90a +\d+ +0/0 +0 +\d+\.\d\d", lines[1])
    assert re.match(r"1 kernels for sm_90a .* 0 errors", lines[2])
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("cached")
    assert KernelCache(tmp_path / "out").get(listed[0], "sm_90a").seconds == 0, "a run finds what was compiled ahead"


def test_a_spill_fails_by_name_also_from_the_cache(listed: list[CudaSource], tmp_path: Path, capsys) -> None:
    listed.append(CudaSource("wide", "spills.cu", "spills", ("sm_90a",), folder=listed[0].folder))
    for _ in range(2):
        assert main(["--arch", "sm_90a", "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert re.match(r"error: kernel 'wide' spills \(\d+/\d+ B a thread at 64 registers\): give it", error)
        assert "fine" not in error


def test_errors_of_one_kernel_leave_the_others(listed: list[CudaSource], tmp_path: Path, capsys) -> None:
    listed.insert(0, CudaSource("bad", "broken.cu", "fine", ("sm_90a",), folder=listed[0].folder))
    assert main(["--arch", "sm_90a", "--out", str(tmp_path / "out")]) == 1
    out, errors = capsys.readouterr()
    assert re.search(r"^bad +sm_90a +failed$", out, re.MULTILINE)
    assert re.search(r"^fine +sm_90a +\d+", out, re.MULTILINE)
    assert "kernel 'bad'" in errors
    assert '"y" is undefined' in errors


def test_an_unlisted_kernel_fails_by_name(listed, tmp_path: Path, capsys, monkeypatch) -> None:
    package = make_package(tmp_path / "package")
    monkeypatch.setattr(catalog, "unlisted_kernels", lambda *args: unlisted_kernels(*args, package))
    assert main(["--arch", "sm_90a", "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert "cuda/sums.cu: sum_rows is not in the catalog: add" in errors
    assert "native/scan_triton.py: _scan_kernel is not in the catalog" in errors


def test_kernels_that_are_not_written_fail(listed, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot keep kernel"):
        assert main(["--arch", "sm_90a", "--out", str(tmp_path / "file")]) == 1
    assert "was not written" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_100a", "sm_20", "gfx942"])
def test_an_arch_without_kernels_is_refused_by_name(listed, arch: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--arch", arch])
    assert caught.value.code == 2
    assert f"(sm_90a), found '{arch}'" in capsys.readouterr().err


def test_two_kernels_of_one_name_are_refused(monkeypatch) -> None:
    one = catalog._TRITON_MODULES[:1]
    monkeypatch.setattr(catalog, "_TRITON_MODULES", one)
    names = sorted(kernel.name for kernel in triton_kernels())
    monkeypatch.setattr(catalog, "_TRITON_MODULES", one * 2)
    with pytest.raises(KernelError, match=f"more of {', '.join(names)}: rename"):
        triton_kernels()


def test_a_triton_entry_that_does_not_fit_its_kernel_is_named(tmp_path: Path) -> None:
    right = triton_kernels()[0]
    wrong = TritonKernel(
        "wrong", right.module, right.function, ARCHES, right.signature[:3], right.constants, options=right.options
    )
    with pytest.raises(KernelError, match=r"'wrong'.*sm_90a"):
        compile_triton(wrong, "sm_90a", tmp_path)
