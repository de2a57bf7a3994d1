"""A measurement's JSON: what every command's file begins with, and its one way to disk."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def header(command: str, machine: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    """What the measured values are added to.

    Args:
        command: as `machine.command_line` gives it.
        machine: as `machine.describe_gpu` gives it in the process that measured.
        versions: of packages; by layer where several are measured.

    Returns:
        These, and `date` (UTC).
    """
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "command": command, "machine": dict(machine), "versions": dict(versions)}


def write(results: Mapping[str, Any], output: Path | None) -> None:
    """To `output`, where one is asked for.

    Raises:
        OSError: it cannot be written.
    """
    if output is not None:
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
