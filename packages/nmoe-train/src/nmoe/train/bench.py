"""`python -m nmoe.train.bench CONFIG.toml [--steps N] [--last M]`: trains for N steps and tells the rates as JSON, with
what produced them. `python -m nmoe.train.bench RUN_FOLDER [--last M]`: of a run that was made before.

The figures are medians over the last recorded steps of an unmodified `n train`, so that they are what a user gets. It
is started as a process of its own, since this package stands below nmoe-cli, which must be installed beside it. Its
words go to standard error as they come, and the JSON to standard output, or to a file. That is made to be committed: it
names no folder of the machine above a file's own, and no device by its serial number.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from nmoe.train.errors import TrainError
from nmoe.train.metrics import read_metrics
from nmoe.train.run_folder import RunFolder, new_run_id

STEPS, LAST = 200, 100
MEDIANS = ("perf/ms_step", "perf/tokens_per_s", "perf/mfu")
PACKAGES = ("torch", "triton", "nvidia-cudnn-cu13", "numpy")
_ABSOLUTE = re.compile(r"""(?<![^\s"'=:,\[({])/[^\s"',\])}]+""")
"""An absolute path within a text: one that begins the text, or follows what may stand before a value."""


class BenchError(TrainError):
    """There is nothing to tell the rates of."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        self.exit_code = exit_code
        """What the command ends with."""
        super().__init__(message)


def train(config: Path, sets: Sequence[str], steps: int, data_root: Path) -> Path:
    """The folder of a new run of `steps` steps by `n train`, without checkpoints and evaluations.

    Args:
        config: the configuration's file.
        sets: `section.key=value` each, as `n train --set` takes them; they come last, and have their say.
        steps: optimizer steps.
        data_root: where `n train` puts runs, in this environment.

    Raises:
        BenchError: `n train` failed; `exit_code` is its own, or 128 and the number of the signal that ended it.
    """
    run = RunFolder(data_root, f"bench-{new_run_id()}")
    command = [sys.executable, "-m", "nmoe.cli", "train", str(config)]
    for value in (f"train.steps={steps}", "checkpoint.enabled=false", "eval.tasks=[]", *sets):
        command += ["--set", value]
    code = _run_to_its_end([*command, "--run-id", run.run_id])
    if code:
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise BenchError(
            f"expected n train to finish, found that it ended with {how}: its own words are above",
            abs(code) + 128 * (code < 0),
        )
    return run.path


def _run_to_its_end(command: Sequence[str]) -> int:
    """The exit code of `command`, negative for a signal. What should stop this process stops that one instead: Ctrl-C,
    which the terminal sends to both, and SIGTERM, which is passed on."""
    process = subprocess.Popen(command, stdout=sys.stderr)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summarise(run: Path, last: int) -> dict[str, Any]:
    """Rates, losses and memory of the run in folder `run`, with its configuration and environment.

    Args:
        run: a run's folder.
        last: recorded steps that the medians are over.

    Raises:
        BenchError: fewer steps are recorded.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run / "metrics").to_pylist():
        series.setdefault(row["tag"], []).append((row["step"], row["value"]))
    losses = series.get("train/loss", [])
    if len(losses) < last:
        raise BenchError(
            f"{run}: expected at least {last} recorded steps, for medians over so many, found {len(losses)}: "
            "a smaller --last, or a longer run"
        )
    env = json.loads((run / "env.json").read_text())
    config = tomllib.loads((run / "config.toml").read_text())
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


def main(words: Sequence[str] | None = None) -> None:
    """Reads the command line and the environment."""
    parser = argparse.ArgumentParser(prog="python -m nmoe.train.bench", description="A run's rates as JSON.")
    parser.add_argument("path", type=Path, help="a configuration (.toml), to be run now; or the folder of a run")
    parser.add_argument("--steps", type=_count, help=f"of the run of a configuration; {STEPS} if left out")
    parser.add_argument(
        "--last", type=_count, default=LAST, help="recorded steps that the medians are over; %(default)s"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="as n train takes it")
    parser.add_argument("--output", type=Path, help="file to write; standard output if left out")
    arguments = parser.parse_args(words)
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        parser.error(f"--output {arguments.output}: expected an existing folder around it, found none: make it first")
    data_root = Path(os.environ.get("NMOE_DATA_PATH") or "data")  # as the command `n` has it
    try:
        run = _run_of(arguments.path, arguments.set, arguments.steps, arguments.last, data_root)
        text = json.dumps(summarise(run, arguments.last), indent=1)
    except BenchError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")


def _run_of(path: Path, sets: Sequence[str], steps: int | None, last: int, data_root: Path) -> Path:
    """The folder of the run that `path` is, or that is made of the configuration that it is."""
    if path.is_file() and path.suffix == ".toml":
        if last > (steps or STEPS):
            raise BenchError(f"expected --last of at most the {steps or STEPS} --steps, found {last}: lower it")
        return train(path, sets, steps or STEPS, data_root)
    if not ((path / "config.toml").is_file() and (path / "metrics").is_dir()):
        kind = "a file of another kind" if path.is_file() else "another folder" if path.is_dir() else "nothing"
        raise BenchError(f"{path}: expected a configuration (.toml) or the folder of a run, found {kind} there")
    if steps is not None or sets:
        raise BenchError(
            f"{path}: expected --steps and --set with a configuration alone, found a run, which has its own"
        )
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of steps, found {text!r}: 1 or more")
    return int(text)


if __name__ == "__main__":
    main()
