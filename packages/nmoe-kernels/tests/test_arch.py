"""What a device is, and what is said when it cannot do what was asked."""

import subprocess
import sys
from dataclasses import fields
from functools import partial

import pytest
import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch, device_limits, entry_for, known_devices
from nmoe.kernels.errors import KernelError, UnsupportedArchError
from nmoe.kernels.ops import Ops, select_ops


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "NVIDIA Test") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_arch_by_compute_capability(monkeypatch, capability: tuple[int, int], arch: str) -> None:
    pretend(monkeypatch, capability)
    assert detect_arch() == arch


def test_no_gpu_names_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedArchError, match=r"found none.*runtime\.device = 'cpu'.*'reference'"):
        detect_arch()
    with pytest.raises(UnsupportedArchError, match=r"runtime\.kernels = 'reference'"):
        select_ops("native", "cuda")


def test_an_entry_is_that_of_the_arch(monkeypatch) -> None:
    table = {"sm_90a": "Hopper's", "sm_100a": "Blackwell's"}
    for capability, entry in (((9, 0), "Hopper's"), ((10, 0), "Blackwell's")):
        pretend(monkeypatch, capability)
        assert entry_for(torch.device("cuda"), table, "the kernels") == entry


def test_no_entry_names_those_there_are_and_the_remedy(monkeypatch) -> None:
    pretend(monkeypatch, (8, 0))
    told = r"one of sm_90a, sm_100a for the kernels, found sm_80: set runtime\.kernels = 'reference'"
    with pytest.raises(UnsupportedArchError, match=told):
        entry_for(torch.device("cuda"), dict.fromkeys(NATIVE_ARCHES), "the kernels")


def test_native_on_cpu_is_refused() -> None:
    with pytest.raises(UnsupportedArchError, match=r"found 'cpu'.*set runtime\.kernels = 'reference'") as caught:
        select_ops("native", "cpu")
    assert isinstance(caught.value, KernelError)


def test_native_on_another_arch_is_refused_by_name(monkeypatch) -> None:
    pretend(monkeypatch, (8, 0), "NVIDIA A100-SXM4-80GB")
    with pytest.raises(UnsupportedArchError) as caught:
        select_ops("native", "cuda")
    message = str(caught.value)
    assert "sm_80" in message
    assert "NVIDIA A100-SXM4-80GB" in message
    assert all(arch in message for arch in NATIVE_ARCHES)
    assert "runtime.kernels = 'reference'" in message


def modules(ops: Ops) -> set[str]:
    """Of every op, and of what an op is made of."""
    found = []
    for field in fields(ops)[1:]:
        op = getattr(ops, field.name)
        if isinstance(op, partial):
            found += [op.func, *(op.args[0] if op.args else ()), *op.keywords.values()]
        else:
            found.append(op)
    return {op.__module__.removeprefix("nmoe.kernels.") for op in found if "<lambda>" not in op.__name__}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton and the CUDA kernels are for Linux")
@pytest.mark.parametrize(
    ("capability", "experts"),
    [
        ((9, 0), {"native.experts_cuda"}),
        ((10, 0), {"native.grouped_gemm_triton", "reference.experts"}),
    ],
)
def test_native_on_its_arch_is_native(monkeypatch, capability: tuple[int, int], experts: set[str]) -> None:
    """Each arch has kernels that are written for it, and for all else what both share."""
    pretend(monkeypatch, capability)
    ops = select_ops("native", "cuda")
    assert ops.tier == "native"
    triton = ("mla", "newton_schulz", "qkv", "rope", "swiglu")
    shared = {*(f"native.{name}_triton" for name in triton), "native.attention", "native.norm", "native.routing_cuda"}
    shared |= {f"native.{name}_cuda" for name in ("adamw", "balance", "cross_entropy", "global_norm", "muon")}
    shared.add("reference.cross_entropy")  # its products are the library's in both tiers
    assert modules(ops) == shared | experts


@pytest.mark.skipif(sys.platform != "linux", reason="Triton and the CUDA kernels are for Linux")
def test_native_index_takes_the_counts_of_the_route(monkeypatch) -> None:
    """They save a launch."""
    from nmoe.kernels.native import routing_cuda

    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(routing_cuda, "index_rows", lambda *arguments: arguments)
    expert_TK, gate_TK, histogram_BE = torch.zeros(3)
    given = select_ops("native", "cuda").index_rows(routing_cuda.Routing(expert_TK, gate_TK, histogram_BE), 8)
    assert given[0] is expert_TK
    assert given[1:] == (8, histogram_BE)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_reference_runs_anywhere_and_only_when_asked(device: str) -> None:
    ops = select_ops("reference", device)
    assert ops.tier == "reference"
    named = {"adamw", "attention", "balance", "experts", "grouped_gemm", "routing"}
    named |= {"cross_entropy", "mla", "norm", "qkv", "rope", "swiglu"}
    named |= {"global_norm", "muon", "newton_schulz"}
    assert modules(ops) == {f"reference.{name}" for name in named}


def test_limits_are_known_or_none() -> None:
    assert device_limits("Some GPU of next year") is None
    h200 = device_limits("NVIDIA H200")
    assert h200 is not None
    assert h200.bf16_flops == pytest.approx(989e12, rel=1e-3)
    assert 140e9 < h200.memory_bytes < 151e9
    for name, limits in known_devices().items():
        assert device_limits(name) == limits
        assert 1e14 < limits.bf16_flops < 1e16, "dense bf16 FLOP/s"
        assert 10e9 < limits.memory_bytes < 1e12


def test_the_table_of_limits_is_not_shared() -> None:
    known_devices().clear()
    assert device_limits("NVIDIA H200") is not None


def test_every_public_name_is_there_and_comes_late() -> None:
    code = (
        "import sys, nmoe.kernels as k\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(k, name) is not None for name in k.__all__)\n"
        "try: k.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
