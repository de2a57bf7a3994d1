"""What `n doctor` finds, and what it makes of it."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
from nmoe.cli import doctor
from nmoe.cli.doctor import Status
from nmoe.cli.errors import ExitCode

torch = pytest.importorskip("torch")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: None)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends to GPUs: (name, capability) each, and pairs that cannot reach each other."""

    def pretend(*kinds, blind=()):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(kinds))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in blind)
        named = [SimpleNamespace(name=name, total_memory=141 * 10**9) for name, _ in kinds]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: named[index])
        capability = lambda device: kinds[torch.device(device).index][1]  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)

    return pretend


def found(checks):
    return {check.name: check for check in checks}


def test_a_machine_without_a_gpu_is_fit_for_cpu_runs(n, no_gpu):
    outcome = n("doctor", "--device", "cpu")
    assert outcome.code == ExitCode.OK
    parts = {line.split()[1] for line in outcome.out.splitlines() if line.startswith(("ok", "missing"))}
    gpu_parts = {"gpu", "triton", "nvrtc"}
    assert parts == {"device", "python", "system", "nmoe", "disk", "torch", "threads"} | gpu_parts


def test_asked_for_cuda_it_is_not_and_the_remedy_is_told(n, no_gpu):
    outcome = n("doctor", "--device", "cuda")
    assert outcome.code == ExitCode.ENVIRONMENT
    assert 'gpu: without one, runtime.device = "cpu" is what runs' in outcome.out


def test_the_device_is_what_the_machine_has(monkeypatch, tmp_path):
    for driver, device in ((None, "cpu"), ("580.1", "cuda")):
        monkeypatch.setattr(doctor, "nvidia_driver", lambda driver=driver: driver)
        assert next(doctor.diagnose(None, tmp_path)).found.startswith(device)


def test_gpus_are_told_with_arch_and_memory(gpus):
    gpus(("NVIDIA H200", (9, 0)), ("NVIDIA RTX 4090", (8, 9)))
    checks = found(doctor.gpus("cuda", "580.82.07"))
    assert checks["driver"].found == "580.82.07"
    assert checks["gpu 0"].found == "NVIDIA H200, 131.3 GiB, sm_90a"
    assert checks["gpu 0"].means == ""
    assert "reference" in checks["gpu 1"].means
    assert checks["peer access"].found == "all 2 pairs"


def test_pairs_without_peer_access_are_named(gpus):
    gpus(*[("NVIDIA H200", (9, 0))] * 3, blind={(0, 2), (2, 1)})
    check = found(doctor.gpus("cuda", "580.82.07"))["peer access"]
    assert (check.status, check.found) == (Status.MISSING, "none for 0→2, 2→1")


@pytest.mark.parametrize(("device", "status"), [("cuda", Status.BROKEN), ("cpu", Status.MISSING)])
def test_a_driver_without_usable_gpus(gpus, monkeypatch, device, status):
    gpus()
    assert found(doctor.gpus(device, "470.1"))["gpu"].status is status
    monkeypatch.setattr(torch.version, "cuda", None)
    check = found(doctor.gpus(device, "580.1"))["gpu"]
    assert (check.status, "CPU only" in check.found) == (status, True)


def test_a_compiler_that_fails_is_broken_only_where_it_is_needed(monkeypatch, tmp_path):
    def fails():
        raise ImportError("libsomething.so: not found\nmore")

    monkeypatch.setattr(doctor, "_triton", fails)
    monkeypatch.setattr(doctor, "_nvrtc", fails)
    for device, status in (("cuda", Status.BROKEN), ("cpu", Status.MISSING)):
        checks = found(doctor._compilers(device))
        assert (checks["triton"].status, checks["triton"].found) == (status, "ImportError: libsomething.so: not found")
        assert checks["nvrtc"].status is status


def test_triton_needs_a_c_compiler(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no C compiler" in found(doctor._compilers("cuda"))["triton"].found


def test_the_disk_is_that_of_a_folder_still_to_come(tmp_path):
    check = doctor.disk(tmp_path / "not" / "yet")
    assert check.status is Status.OK
    assert not (tmp_path / "not").exists()


def test_a_full_disk_and_a_closed_folder_are_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    assert doctor.disk(tmp_path).status is Status.BROKEN
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "takes no files" in doctor.disk(tmp_path).found
    (tmp_path / "file").write_text("")
    assert "takes no files" in doctor.disk(tmp_path / "file" / "below").found


def test_a_torch_that_does_not_load_is_a_finding(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (check,) = doctor._torch_checks("cpu")
    assert (check.name, check.status) == ("torch", Status.BROKEN)


def test_the_driver_version_is_read_from_the_kernel_module(monkeypatch, tmp_path):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (x)  Wed Aug 27 2025\n"
    monkeypatch.setattr(doctor.Path, "read_text", lambda _: text)
    assert doctor.nvidia_driver() == "580.82.07"

    def missing(_):
        raise OSError(errno.ENOENT, "none")

    monkeypatch.setattr(doctor.Path, "read_text", missing)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.nvidia_driver() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(tool))
    assert doctor.nvidia_driver() == "570.86.15"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.nvidia_driver() is None
