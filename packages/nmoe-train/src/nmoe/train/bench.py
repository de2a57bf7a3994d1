"""`python -m nmoe.train.bench RUN_FOLDER [--last N] [--output FILE]`: a run's rates as JSON, with what produced them.

The figures are medians over the last recorded steps of an unmodified `n train`, so that they are what a user gets.
"""

import argparse
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from nmoe.train.metrics import read_metrics

MEDIANS = ("perf/ms_step", "perf/tokens_per_s", "perf/mfu")
PACKAGES = ("torch", "triton", "nvidia-cudnn-cu13", "numpy")


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
    losses = series["train/loss"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": env["command"],
        "machine": env["gpus"] or env["cpu"],
        "versions": {"python": env["python"]["version"]}
        | {name: env["packages"][name] for name in PACKAGES if name in env["packages"]},
        "commit": env["git"]["commit"] if env["git"] else None,
        "config": tomllib.loads((run / "config.toml").read_text()),
        "steps": losses[-1][0],
        "medians_over_last_steps": last,
        **{tag: median(value for _, value in series[tag][-last:]) for tag in MEDIANS if tag in series},
        "perf/memory_bytes": max((value for _, value in series.get("perf/memory_bytes", [])), default=None),
        "train/loss": {str(step): value for step, value in losses},
        **{tag: series[tag][-1][1] for tag in ("val/loss", "val/bpb") if tag in series},
    }


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
