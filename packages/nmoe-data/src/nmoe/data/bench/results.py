"""A result file's head, and its writing."""

import json
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "pyarrow", "tiktoken")


def header(bench: str, arguments: Sequence[str], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Date, command, machine and versions. Of paths in the command only the last part, and none of `--output`."""
    words = [f"--{word.removeprefix('--')}" if word.startswith("--") else Path(word).name for word in arguments]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "nmoe.data.bench", bench, *words]),
        "machine": {"cpu": _cpu(), "cpu_count": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def write(results: Mapping[str, Any], output: Path | None) -> None:
    """As JSON to a file, or to standard output."""
    text = json.dumps(results, indent=1)
    if output is None:
        print(text)
    else:
        output.write_text(text + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
