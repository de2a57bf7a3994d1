"""What produced a run: code, packages, machine, command. Each part is best effort, and absent where it is unknown."""

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

_MAX_DIFF = 1 << 20
"""Characters of an uncommitted diff that are kept."""


def environment() -> dict[str, Any]:
    """Describes this process as JSON: command, Python, platform, packages, threads, devices, driver, git state.

    `git` is that of the repository around the working directory, `None` if there is none: `diff` is what is not
    committed, `untracked` names files that git does not know. GPUs are asked for through the driver's own tool, so that
    none is initialised.
    """
    import torch

    packages = {distribution.metadata["Name"]: distribution.version for distribution in distributions()}
    return {
        "command": list(sys.orig_argv),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items())),
        "cpu": {"name": _cpu_name(), "count": os.cpu_count()},
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "git": _git(),
    }


def git_commit() -> str | None:
    """The commit checked out around the working directory; `None` if there is none."""
    return _output("git", "rev-parse", "HEAD")


def _git() -> dict[str, Any] | None:
    commit = git_commit()
    if commit is None:
        return None
    diff = _output("git", "diff", "HEAD") or ""
    untracked = (_output("git", "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or "").splitlines()
    return {
        "commit": commit,
        "diff": diff[:_MAX_DIFF],
        "diff_is_cut": len(diff) > _MAX_DIFF,
        "untracked": untracked[:1000],
    }


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "uuid", "memory.total", "compute_cap", "driver_version")
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader") or ""
    rows = [line.split(", ") for line in text.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")
