"""Runs a worker in a fresh process, and makes a result of whatever comes of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe.kernels.bench.machine import without_folders

# What the CuTe DSL's .pth file would add, which no PYTHONPATH reads.
_PTH_FOLDERS = ("nvidia_cutlass_dsl/python_packages", "nvidia_cutlass_dsl/dsl_packages")
SONIC_ENVIRONMENT = {"QUACK_CACHE_AUTOTUNING": "1", "TRITON_CACHE_AUTOTUNING": "1"}
"""SonicMoE tunes a new shape for minutes; so it keeps what it found."""


def sonic_environment(peer_path: str | None) -> dict[str, str]:
    """Variables of SonicMoE's process: its packages come first, and what it tunes is kept on disk.

    Args:
        peer_path: the folder of its packages; None: they are installed.
    """
    if peer_path is None:
        return SONIC_ENVIRONMENT
    folder = Path(peer_path).absolute()
    folders = [folder, *(path for name in _PTH_FOLDERS if (path := folder / name).is_dir())]
    rest = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return SONIC_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *rest])}


def run_process(
    arguments: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON line that `python -m nmoe.kernels.bench worker …` prints; `{"error": …}` where there is none.

    Args:
        arguments: of the worker.
        timeout_s: after which the process is ended.
        environment: variables beside this process's own.
    """
    command = [sys.executable, "-m", "nmoe.kernels.bench", "worker", *arguments]
    return run_command(command, timeout_s=timeout_s, environment=environment)


def run_command(
    command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As `run_process`, of any command."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # so that what it starts, as a tuner's compilers, ends with it
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return {"error": f"took longer than {timeout_s:g} s: give it more with --timeout"}
        raise
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            try:
                result = json.loads(line)
            except json.JSONDecodeError:
                break
            if process.returncode == 0 or "error" in result:
                return result
            break
    told = [line.strip() for line in stderr.splitlines() if line.strip()]
    ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    return {"error": without_folders(f"{ended}, no result; {told[-1] if told else 'nothing on stderr'}")[:300]}
