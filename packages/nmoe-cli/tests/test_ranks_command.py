"""`n train` on two ranks of this machine's CPU, as a user would type it."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nmoe.cli.app import run
from nmoe.cli.console import make_console
from nmoe.cli.context import Context
from nmoe.train.experiments import Experiments
from nmoe.train.metrics import read_metrics

DENSE = ("n_routed_experts = 4\nn_activated_experts = 2", "n_dense_layers = 2")
TWO = ("--set", "runtime.world_size=2", "--set", "train.micro_batch_size=2", "--set", "eval.max_sequences=8")
NANO = Path(__file__).parents[3] / "configs" / "nano.toml"
LONG_S = 120
"""Till a test gives up on a process, on a machine that does other things too."""


@pytest.fixture
def dense(config_file):
    return config_file(DENSE, ("moe_inter_dim = 16\n", ""), name="dense.toml")


@pytest.fixture
def root(tmp_path):
    """Where the fixture `n` keeps runs."""
    return tmp_path / "root"


@pytest.fixture
def prepared(n, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "more.txt").write_text("pack my box with five dozen liquor jugs. " * 60)
    output = tmp_path / "tokens"
    assert n("data", "prep", tmp_path / "text.txt", tmp_path / "more.txt", "--output", output).code == 0
    return output


def losses(root, run_id, tag="train/loss"):
    rows = read_metrics(root / "runs" / run_id / "metrics", tags=[tag]).to_pylist()
    assert {row["rank"] for row in rows} == {0}
    return {row["step"]: row["value"] for row in rows}


def record(root, run_id):
    with Experiments(root / "experiments.db") as experiments:
        return experiments.get(run_id)


def test_two_ranks_train_what_one_trains_and_rank_0_alone_tells_of_it(n, dense, prepared, root):
    common = ["train", dense, "--set", f"data.path={prepared}", "--set", "train.steps=4"]
    outcome = n(*common, *TWO, "--run-id", "two")
    assert outcome.code == 0, outcome.err
    assert n(*common, "--set", "eval.max_sequences=8", "--set", "runtime.threads=1", "--run-id", "one").code == 0

    for tag, steps in (("train/loss", 4), ("train/grad_norm", 4), ("val/loss", 1)):
        assert len(losses(root, "two", tag)) == steps
        assert losses(root, "two", tag) == pytest.approx(losses(root, "one", tag), rel=1e-4)
    for part, times in (("Run two starts", 1), ("Sample (", 1), ("== Run two: finished", 1), ("val/bpb", 2)):
        assert outcome.out.count(part) == times, part
    logs = root / "runs" / "two" / "logs"
    assert {path.name for path in logs.iterdir()} == {"rank_0.log", "rank_1.log"}
    said = (logs / "rank_0.log").read_text()
    assert "== Run two: finished" in said
    assert "Run two" not in (logs / "rank_1.log").read_text()
    assert (record(root, "two").status, record(root, "two").step) == ("finished", 4)
    assert record(root, "two").val_loss == pytest.approx(record(root, "one").val_loss, rel=1e-4)

    # What one rank makes, two go on with.
    outcome = n(*common, *TWO, "--set", "train.steps=5", "--run-id", "one")
    assert outcome.code == 0, outcome.err
    assert "resumes after step 4" in outcome.out
    assert "runtime.world_size: 1 before, 2 now" in outcome.out


def test_a_rank_that_fails_ends_all_with_its_own_traceback_first(dense, prepared, root):
    out, err = io.StringIO(), io.StringIO()
    program = (sys.executable, str(Path(__file__).with_name("failing_rank.py")))
    context = Context(root, {}, make_console(out), make_console(err), program=program)
    sets = ["--set", f"data.path={prepared}", "--set", "train.steps=100000"]
    start = time.monotonic()
    code = run(["train", str(dense), *sets, *TWO, "--run-id", "failing"], context)
    assert time.monotonic() - start < LONG_S, "far from the 100,000 steps, and from rdep.timeout_s"
    assert code == 1
    told = err.getvalue()
    assert told.startswith("Traceback")
    assert "RuntimeError: on purpose" in told.partition("Rank 1 of 2")[0]
    assert re.search(r"Rank 1 of 2 \(process \d+\) ended with exit code 1; .*failing/logs", told)
    assert told.count("Traceback") == 1, "nothing of the rank that fell because of it"
    assert "--run-id failing" in told
    row = record(root, "failing")
    assert (row.status, row.message) == ("failed", "rank 1: RuntimeError: on purpose")


def test_a_signal_stops_all_ranks_at_one_step_which_is_saved(n, dense, prepared, root):
    sets = ["--set", f"data.path={prepared}", "--set", "train.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nmoe.cli", "train", str(dense), *sets, *TWO, "--run-id", "stopped"],
        env={**os.environ, "NMOE_DATA_PATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    folder, deadline = root / "runs" / "stopped", time.monotonic() + LONG_S
    while not list(folder.glob("metrics/*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LONG_S)
    assert process.returncode == 143, output
    stopped = re.search(r"Stopped after step (\d+), which is saved; continue it with:\n(.*)", output)
    assert stopped, output
    step = int(stopped[1])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{step:08}"]
    assert max(losses(root, "stopped")) == step
    assert record(root, "stopped").status == "interrupted"

    # What two ranks save, one goes on with.
    more = ["--set", f"train.steps={step + 2}", "--set", "eval.max_sequences=2"]
    outcome = n("train", dense, *sets, *more, "--run-id", "stopped")
    assert outcome.code == 0, outcome.err
    assert f"resumes after step {step}" in outcome.out
    assert max(losses(root, "stopped")) == step + 2


def test_ranks_that_torchrun_starts_meet_and_make_one_run(dense, prepared, root):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "nmoe.cli", "train", str(dense), "--set", f"data.path={prepared}", *TWO]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, "--set", "train.steps=2"],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "NMOE_DATA_PATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=LONG_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (folder,) = (root / "runs").iterdir()
    assert f"== Run {folder.name}: finished" in said[0][0]
    assert said[1][0] == "", "only rank 0 speaks"


def test_every_mistake_is_told_once_and_before_anything_is_made(n, config_file, prepared, root):
    small = config_file()  # 4 experts, 8 sequences
    outcome = n("train", small, "--set", f"data.path={prepared}", "--set", "runtime.world_size=3")
    assert outcome.code == 2
    assert "model.n_routed_experts = 4 do not divide among runtime.world_size = 3 ranks" in outcome.err
    assert "train.batch_size = 8 is no multiple" in outcome.err
    assert outcome.err.count("error:") == 1
    outcome = n("train", small, "--set", f"data.path={prepared}", "--set", "rdep.transport=ipc", *TWO)
    assert outcome.code == 2
    assert "rdep.transport = 'ipc' serves several ranks on GPUs" in outcome.err
    assert "use 'shm'" in outcome.err
    outcome = n("train", small, "--set", "data.path=nowhere", *TWO)
    assert outcome.code == 3
    assert outcome.err.count("error:") == 1
    assert not (root / "runs").exists()
    assert not (root / "experiments.db").exists()


def test_gpus_is_a_world_size_of_gpus(n, config_file, prepared, root, monkeypatch):
    small = config_file(DENSE, ("moe_inter_dim = 16\n", ""), ('device = "cpu"', 'device = "cuda"'), name="gpu.toml")
    outcome = n("train", small, "--gpus", "2", "--dry-run")
    assert outcome.code == 0
    assert "world_size = 2" in outcome.out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = n("train", small, "--gpus", "2", "--set", f"data.path={prepared}")
    assert outcome.code == 5
    assert "expected 2 visible GPUs" in outcome.err
    assert "found 1: use --gpus 1" in outcome.err
    assert not (root / "runs").exists()
    sparse = config_file(('device = "cpu"', 'device = "cuda"'), name="sparse.toml")
    outcome = n("train", sparse, "--gpus", "2", "--dry-run")
    assert outcome.code == 2
    assert "needs native kernels, which move the rows" in outcome.err
    outcome = n("train", config_file(), "--gpus", "2")
    assert outcome.code == 2
    assert "--set runtime.world_size=2" in outcome.err
    assert n("train", small, "--gpus", "0").code == 2


@pytest.mark.soak
@pytest.mark.skipif(not NANO.is_file(), reason="the shipped configurations lie in the repository alone")
def test_nano_learns_the_same_on_one_two_and_four_ranks(n, root):
    """Experts, sliding windows and MTP, on the text that ships with Python: rows travel, the losses stay."""
    curves = {}
    for ranks in (1, 2, 4):
        sets = [
            "train.steps=12",
            f"runtime.world_size={ranks}",
            f"train.micro_batch_size={8 // ranks}",
            "eval.tasks=[]",
        ]
        outcome = n("train", NANO, *(part for value in sets for part in ("--set", value)), "--run-id", f"on-{ranks}")
        assert outcome.code == 0, outcome.err
        curves[ranks] = losses(root, f"on-{ranks}")
    assert len(curves[1]) == 12
    assert curves[1][12] < curves[1][1] - 1.0
    for ranks in (2, 4):
        assert curves[ranks] == pytest.approx(curves[1], rel=1e-4)
