"""Training on a GPU as a user runs it: the same bits twice, in CUDA graphs or not, killed or not, and nothing lost."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nmoe.train.checkpointer import load, newest_complete, step_of

pytestmark = pytest.mark.gpu

CONFIG = """\
[model]
vocab_size = 257
dim = 128
n_layers = 4
n_dense_layers = 1
n_heads = 4
init_std = 0.03
kv_lora_rank = 64
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 64
attn_local = "swa"
attn_local_window = 64
attn_global_every = 2
inter_dim = 384
moe_inter_dim = 128
n_routed_experts = 8
n_activated_experts = 2
n_shared_experts = 1
seq_balance_loss = 1e-4
mtp_depth = 1

[data]
tokenizer = "byte"
corpus = "pydoc"

[train]
steps = 60
batch_size = 12
micro_batch_size = 4
seq_len = 256

[optim]
lr_dense = 0.012
lr_router = 0.012
lr_expert = 0.012
dense_optimizer = "muon"
expert_optimizer = "muon"

[schedule]
warmup_steps = 10
hold_tokens = 100_000
decay_tokens = 80_000

[checkpoint]
every = 10
keep = 100

[eval]
every = 25
max_sequences = 20

[runtime]
device = "cuda"
precision = "bf16"
kernels = "native"
"""


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, found none")


@pytest.fixture
def start(tmp_path):
    """Starts `n train` of the configuration above as a process of its own."""
    config = tmp_path / "small.toml"
    config.write_text(CONFIG)

    def call(run_id: str, *settings: str) -> subprocess.Popen[str]:
        options = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "nmoe.cli", "train", str(config), "--run-id", run_id, *options]
        environ = {**os.environ, "NMOE_DATA_PATH": str(tmp_path / "data")}
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return call


def checkpoints(tmp_path: Path, run_id: str) -> Path:
    return tmp_path / "data" / "runs" / run_id / "checkpoints"


def digest(tmp_path: Path, run_id: str, step: int) -> str:
    path = newest_complete(checkpoints(tmp_path, run_id))
    assert path is not None
    assert step_of(path) == step
    folder, sha = load(path), hashlib.sha256()
    for name in folder.names:
        sha.update(name.encode())
        sha.update(folder.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def test_the_same_bits_twice_and_without_a_graph_and_after_a_kill(tmp_path, start):
    """Weights, residuals, momentum, biases and random generators, under Muon, MTP, windows, three micro-batches, and
    evaluations in between."""
    variants = {
        "again": (),
        "eager": ("runtime.cuda_graph=false",),
        "unmeasured": ("eval.tasks=[]",),
        "recomputed": ("train.recompute_layers=[1, 3]",),
        "verified": ("train.verify_every=7", "train.verify_times=3"),
    }
    finish(start("whole"))
    expected = digest(tmp_path, "whole", 60)
    running = {name: start(name, *settings) for name, settings in variants.items()}
    for name, process in running.items():
        finish(process)
        assert digest(tmp_path, name, 60) == expected, name

    cut = start("cut", "checkpoint.every=2")
    folder = checkpoints(tmp_path, "cut")
    while cut.poll() is None and not (folder.is_dir() and (path := newest_complete(folder)) and step_of(path) >= 20):
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.communicate(timeout=60)
    assert cut.returncode == -signal.SIGKILL, "it ended before the kill"
    finish(start("cut", "checkpoint.every=2"))
    assert digest(tmp_path, "cut", 60) == expected
    finish(start("seed", "runtime.seed=1"))
    assert digest(tmp_path, "seed", 60) != expected, "the digest sees a difference"


def test_heads_as_wide_as_moonlights_too(tmp_path, start):
    """Their attention has kernels of its own, as have those of up to 64 columns."""
    widths = ("model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64", "model.v_head_dim=128", "eval.tasks=[]")
    running = {
        name: start(name, *widths, *settings)
        for name, settings in {
            "once": (),
            "eager": ("runtime.cuda_graph=false",),
            "recomputed": ("train.recompute_layers=[1, 3]",),
        }.items()
    }
    for process in running.values():
        finish(process)
    assert len({digest(tmp_path, name, 60) for name in running}) == 1


@pytest.mark.soak
def test_a_thousand_steps_in_graphs_equal_a_thousand_eager_ones(tmp_path, start):
    length = ("train.steps=1000", "schedule.hold_tokens=2_000_000", "schedule.decay_tokens=900_000", "eval.tasks=[]")
    running = [start(name, *length, f"runtime.cuda_graph={graph}") for name, graph in (("a", "true"), ("b", "false"))]
    for process in running:
        finish(process)
    assert digest(tmp_path, "a", 1000) == digest(tmp_path, "b", 1000)


PLAIN = CONFIG[: CONFIG.index("kv_lora_rank")] + """\
attn = "sdpa"
head_dim = 64
qk_norm = true
""" + CONFIG[CONFIG.index("attn_local =") :]  # fmt: skip


def test_plain_attention_adamw_and_one_micro_batch_too(tmp_path, start):
    """And a run that a signal ends while a step is under way."""
    (tmp_path / "small.toml").write_text(PLAIN.replace("seq_balance_loss", "aux_loss").replace("mtp_depth = 1", ""))
    settings = ("optim.dense_optimizer=adamw", "optim.expert_optimizer=adamw", "train.micro_batch_size=12")
    settings += ("eval.tasks=[]", "checkpoint.every=50")
    finish(start("whole", *settings))
    expected = digest(tmp_path, "whole", 60)
    finish(start("eager", *settings, "runtime.cuda_graph=false"))
    assert digest(tmp_path, "eager", 60) == expected
    cut = start("cut", *settings)
    metrics = tmp_path / "data" / "runs" / "cut" / "metrics"
    while cut.poll() is None and not (metrics.is_dir() and len(list(metrics.iterdir())) >= 10):
        time.sleep(0.01)
    cut.send_signal(signal.SIGTERM)
    cut.communicate(timeout=60)
    assert cut.returncode == 128 + signal.SIGTERM, "it ended before the signal"
    finish(start("cut", *settings))
    assert digest(tmp_path, "cut", 60) == expected


def test_a_step_that_is_not_finite_is_told_and_saves_nothing(tmp_path, start):
    """A learning rate that overflows; the step after it has been launched by the time that the host learns of it."""
    settings = ("optim.lr_dense=1e30", "checkpoint.every=50", "eval.tasks=[]", "schedule.warmup_steps=0")
    process = start("diverging", *settings, "optim.dense_optimizer=adamw")
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "expected finite numbers" in output
    assert newest_complete(checkpoints(tmp_path, "diverging")) is None
