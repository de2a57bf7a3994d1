"""`python -m nmoe.train.bench RUN_FOLDER [--last N] [--output FILE]`: a run's rates as JSON, with what produced them.

The figures are medians over the last recorded steps of an unmodified `n train`, so that they are what a user gets. The
JSON is made to be committed: it names no folder of the machine above a file's own, and no device by its serial number.
"""

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from nmoe.train.metrics import read_metrics

MEDIANS = ("perf/ms_step", "perf/tokens_per_s", "perf/mfu")
PACKAGES = ("torch", "triton", "nvidia-cudnn-cu13", "numpy")
_ABSOLUTE = re.compile(r"""(?<![^\s"'=:,\[({])/[^\s"',\])}]+""")
"""An absolute path within a text: one that begins the text, or follows what may stand before a value."""


def summarise(run: Path, last: int) -> dict[str, Any]:
    """Rates, losses and memory of the run in folder `run`, with its configuration and environment.

    Args:
        run: a run's folder.
        last: recorded steps that the medians are over.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run / "metrics").to_pylist():
        series.setdefault(row["tag"], []).append((row["step"], row["value"]))
    env = json.loads((run / "env.json").read_text())
    config = tomllib.loads((run / "config.toml").read_text())
    losses = series["train/loss"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(env["command"]),
        "machine": _machine(env, config["runtime"]["device"]),
        "versions": {"python": env["python"]["version"]}
        | {name: env["packages"][name] for name in PACKAGES if name in env["packages"]},
        "commit": env["git"]["commit"] if env["git"] else None,
        "config": _without_folders(config),
        "steps": losses[-1][0],
        "medians_over_last_steps": last,
        **{tag: median(value for _, value in series[tag][-last:]) for tag in MEDIANS if tag in series},
        "perf/memory_bytes": max((value for _, value in series.get("perf/memory_bytes", [])), default=None),
        "train/loss": {str(step): value for step, value in losses},
        **{tag: series[tag][-1][1] for tag in ("val/loss", "val/bpb") if tag in series},
    }


def _command(words: Sequence[str]) -> str:
    """The command as typed: without the interpreter before it and the folders in it."""
    rest = list(words)
    if rest and re.fullmatch(r"python[\d.]*(\.exe)?", Path(rest[0]).name):
        del rest[0]
        # The interpreter's own options, up to what it runs.
        while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
            del rest[: 2 if rest[0] in ("-X", "-W") else 1]
        if rest[:1] == ["-c"]:
            return "python -c …"
        if rest[:1] == ["-m"]:
            rest = ["n", *rest[2:]] if rest[1:2] == ["nmoe.cli"] else ["python", *rest]
    if not rest:
        return "python"
    return shlex.join([Path(rest[0]).name, *(_without_folders(word) for word in rest[1:])])


def _machine(env: dict[str, Any], device: str) -> Any:
    """What the run computed on: the GPUs, or the CPU with the number of its threads of execution."""
    if device == "cpu":
        return {"cpu": env["cpu"]["name"], "cpu_count": env["cpu"]["count"]}
    return [{key: value for key, value in gpu.items() if key != "uuid"} for gpu in env["gpus"]]


def _without_folders(value: Any) -> Any:
    """`value` with every absolute path in it, at any depth, cut to its last two parts."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    quote = path[:1] if path[:1] in ("'", '"') and path[-1:] == path[:1] else ""
    path = path.removeprefix(quote).removesuffix(quote)
    if path.startswith("/") and (not quote or quote not in path):  # the whole of it, spaces too
        return f"{key}{equals}{quote}{_last_parts(path)}{quote}"
    return _ABSOLUTE.sub(lambda match: _last_parts(match[0]), value)


def _last_parts(path: str) -> str:
    return "/".join(Path(path).parts[1:][-2:])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.train.bench", description="A run's rates as JSON.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--last", type=int, default=100, help="recorded steps that the medians are over")
    parser.add_argument("--output", type=Path, help="file to write; standard output if left out")
    arguments = parser.parse_args()
    text = json.dumps(summarise(arguments.run, arguments.last), indent=1)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
