"""A run that is killed again and again ends with the bits of one that was not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nmoe.train.checkpointer import load, newest_complete, step_of

CONFIG = """\
[model]
vocab_size = 257
dim = 64
n_layers = 3
n_heads = 2
init_std = 0.02
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
attn_local = "swa"
attn_local_window = 16
attn_global_every = 2
inter_dim = 128
moe_inter_dim = 64
n_routed_experts = 8
n_activated_experts = 2
n_shared_experts = 1
mtp_depth = 1

[data]
tokenizer = "byte"
corpus = "pydoc"

[train]
steps = 60
batch_size = 4
micro_batch_size = 2
seq_len = 64

[optim]
lr_dense = 1e-2
lr_router = 1e-2
lr_expert = 1e-2
dense_optimizer = "muon"
expert_optimizer = "muon"

[schedule]
warmup_steps = 5
hold_tokens = 5000
decay_tokens = 5000

[checkpoint]
every = 2
keep = 2

[runtime]
device = "cpu"
precision = "fp32"
kernels = "reference"
threads = 1
"""


def start(folder: Path, run_id: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nmoe.cli", "train", str(folder / "killed.toml"), "--run-id", run_id]
    environ = {**os.environ, "NMOE_DATA_PATH": str(folder / "data")}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def digest(checkpoint: Path) -> str:
    folder, sha = load(checkpoint), hashlib.sha256()
    for name in folder.names:
        sha.update(name.encode())
        sha.update(folder.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def is_writing(checkpoints: Path) -> bool:
    return any(path.name.startswith(".") for path in checkpoints.iterdir()) if checkpoints.is_dir() else False


@pytest.mark.parametrize(
    "kills", [pytest.param(2, id="2-kills"), pytest.param(20, id="20-kills", marks=pytest.mark.soak)]
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kills):
    (tmp_path / "killed.toml").write_text(CONFIG)
    whole = start(tmp_path, "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    checkpoints = tmp_path / "data" / "runs" / "cut" / "checkpoints"
    chance, done, in_a_write = random.Random(kills), 0, 0
    while done < kills:
        process = start(tmp_path, "cut")
        # Two kills in three wait for a checkpoint to be in the middle of its write; the others fall anywhere.
        wait_for_write, wait = done % 3 != 0, chance.uniform(0.0, 0.4)
        before = newest_complete(checkpoints) if checkpoints.is_dir() else None
        while process.poll() is None and newest_or_none(checkpoints) == before:
            time.sleep(0.002)  # until the run is on its way
        time.sleep(wait)
        while wait_for_write and process.poll() is None and not is_writing(checkpoints):
            pass
        in_a_write += is_writing(checkpoints)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, output  # it ended before the kill: nothing is left to interrupt
            break
        done += 1
    last = start(tmp_path, "cut")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0 or "has its 60 steps" in output, output
    assert step_of(newest_complete(checkpoints)) == 60
    assert digest(newest_complete(checkpoints)) == digest(newest_complete(tmp_path / "data/runs/whole/checkpoints"))
    assert in_a_write > 0 or kills < 3


def newest_or_none(checkpoints: Path) -> Path | None:
    return newest_complete(checkpoints) if checkpoints.is_dir() else None
