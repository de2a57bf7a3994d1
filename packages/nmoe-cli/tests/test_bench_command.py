"""`python -m nmoe.train.bench CONFIG.toml`, from nothing to JSON, by the real `n train`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nmoe.train.experiments import Experiments
from nmoe.train.metrics import read_metrics


@pytest.fixture
def small(n, config_file, tmp_path):
    """A configuration whose text is prepared."""
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "b.txt").write_text("a second document, so that one is left for validation. " * 60)
    assert n("data", "prep", tmp_path / "a.txt", tmp_path / "b.txt", "--output", tmp_path / "tokens").code == 0
    return config_file(('corpus = "pydoc"', f'path = "{tmp_path}/tokens"'), ("steps = 10", "steps = 5000"))


def start(tmp_path: Path, *words: object) -> subprocess.Popen[str]:
    environ = {**os.environ, "NMOE_DATA_PATH": str(tmp_path / "root"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nmoe.train.bench", *map(str, words)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_configuration_is_run_and_summed_up(small, tmp_path):
    output = tmp_path / "result.json"
    process = start(
        tmp_path, small, "--steps", "6", "--last", "3", "--set", "train.micro_batch_size=2", "--output", output
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == ""
    assert "training loss by step" in err
    result = json.loads(output.read_text())
    (run,) = (tmp_path / "root" / "runs").iterdir()
    assert run.name.startswith("bench-")
    assert not (run / "checkpoints").exists() or not any((run / "checkpoints").iterdir())
    rows = read_metrics(run / "metrics", tags=["train/loss", "perf/ms_step", "val/loss"]).to_pylist()
    assert {row["tag"] for row in rows} == {"train/loss", "perf/ms_step"}, "nothing is evaluated"
    times = [row["value"] for row in rows if row["tag"] == "perf/ms_step"]
    assert len(times) == 6
    assert result["perf/ms_step"] == sorted(times[-3:])[1]
    assert (result["steps"], result["medians_over_last_steps"]) == (6, 3)
    assert result["train/loss"] == {str(row["step"]): row["value"] for row in rows if row["tag"] == "train/loss"}
    assert result["config"]["train"]["steps"] == 6
    assert result["config"]["train"]["micro_batch_size"] == 2
    assert result["config"]["runtime"]["kernels"] == "reference"
    assert result["command"].startswith("n train ")
    assert str(tmp_path) not in output.read_text()


def test_without_a_file_standard_output_is_the_json_alone(small, tmp_path):
    process = start(tmp_path, small, "--steps", "2", "--last", "2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 2
    assert "training loss by step" in err


def test_a_run_that_is_refused_ends_with_its_words_and_exit_code(small, tmp_path):
    process = start(tmp_path, small, "--steps", "2", "--last", "2", "--set", "train.batchsize=3")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert out == ""
    assert "train.batchsize: unknown key; did you mean train.batch_size?" in err
    assert err.splitlines()[-1].startswith("error: expected n train to finish, found that it ended with exit code 2")
    assert not (tmp_path / "root" / "runs").exists()


def test_steps_that_are_not_recorded_are_missed(small, tmp_path):
    process = start(tmp_path, small, "--steps", "6", "--last", "4", "--set", "metrics.every=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert out == ""
    assert "expected at least 4 recorded steps, for medians over so many, found 3" in err.splitlines()[-1]


def test_what_stops_it_stops_the_run(small, tmp_path):
    process = start(tmp_path, small, "--steps", "5000", "--last", "2")
    for line in process.stderr:
        if "step" in line and "loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert out == ""
    assert "ended with exit code 143" in err.splitlines()[-1]
    with Experiments(tmp_path / "root" / "experiments.db") as experiments:
        (row,) = experiments.list()
    assert row.status == "interrupted"
    assert row.step < 5000
