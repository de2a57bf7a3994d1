"""The loop as a whole: same bits after a stop, same update whatever the micro-batches, nothing lost when it fails."""

import hashlib
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import UnsupportedArchError
from nmoe.kernels.ops import select_ops
from nmoe.kernels.reference.master import join_master
from nmoe.model import checkpoint as checkpoint_module
from nmoe.model import folder_place
from nmoe.model.errors import DiskSpaceError
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import open_transport
from nmoe.rdep.world import alone
from nmoe.train import checkpointer as checkpointer_module
from nmoe.train.checkpointer import list_complete, load, newest_complete, step_of
from nmoe.train.errors import IdentityMismatchError, NonFiniteError, NotReproducibleError, WorldSizeError
from nmoe.train.loop import train
from nmoe.train.metrics import read_metrics
from nmoe.train.protocols import RunStart, StepReport
from nmoe.train.recorder import STEPS_LATE
from nmoe.train.run_folder import RunFolder
from nmoe.train.schema import TrainingConfig

IDENTITY = {"key": 1}

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 32,
    "n_layers": 3,
    "n_dense_layers": 1,
    "n_heads": 2,
    "init_std": 0.05,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "attn_local": "swa",
    "attn_local_window": 8,
    "attn_global_every": 2,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "n_routed_experts": 4,
    "n_activated_experts": 2,
    "n_shared_experts": 1,
    "seq_balance_loss": 1e-3,
    "mtp_depth": 1,
}


class RandomTokens:
    """Samples that are a function of their index alone."""

    fingerprint = "random tokens"
    samples_per_epoch = 1 << 40

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def batch(self, cursor: int, count: int) -> np.ndarray:
        rows = [np.random.default_rng(cursor + i).integers(0, 8, self.seq_len + 1) for i in range(count)]
        return np.stack(rows).astype(np.int64) % self.vocab_size


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.started: RunStart | None = None
        self.steps: list[StepReport] = []
        self.evaluations: list[tuple[int, Mapping[str, float]]] = []
        self.checkpoints: list[int] = []
        self.messages: list[str] = []
        self.events: list[str] = []

    def start(self, run: RunStart) -> None:
        self.started = run

    def step(self, report: StepReport) -> None:
        self.steps.append(report)
        self.events.append(f"step {report.step}")

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.evaluations.append((step, values))
        self.events.append(f"evaluation {step}")

    def checkpoint(self, step: int, path: Path) -> None:
        self.checkpoints.append(step)
        self.events.append(f"checkpoint {step}")

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.events.append("close")


def tiny_config(**sections: Mapping[str, Any]) -> TrainingConfig:
    """The tiny setup, with keys of sections replaced."""
    base: dict[str, dict[str, Any]] = {
        "model": TINY_MODEL,
        "train": {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "seq_len": 24},
        "optim": {
            "lr_dense": 1e-2,
            "lr_router": 1e-2,
            "lr_expert": 1e-2,
            "dense_optimizer": "muon",
            "expert_optimizer": "muon",
        },
        "schedule": {"warmup_steps": 2, "hold_tokens": 192, "decay_tokens": 192},
        "checkpoint": {},
        "metrics": {},
        "runtime": {"device": "cpu", "precision": "fp32", "kernels": "reference", "threads": 1},
    }
    return TrainingConfig.model_validate({name: {**keys, **sections.get(name, {})} for name, keys in base.items()})


@pytest.fixture
def recorder():
    return Recorder()


def run_training(tmp_path, name="run", *, config=None, recorder=None, identity=IDENTITY, batches=None, **options):
    config = config or tiny_config()
    run = RunFolder(tmp_path, name)
    run.path.mkdir(parents=True, exist_ok=True)
    batches = batches or RandomTokens(config.model.vocab_size, config.train.seq_len)
    outcome = train(config, run=run, batches=batches, identity=identity, reporter=recorder or Recorder(), **options)
    return run, outcome


def digest(run):
    folder = load(newest_complete(run.checkpoints))
    sha = hashlib.sha256()
    for name in folder.names:
        sha.update(name.encode())
        sha.update(folder.tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def weights(run):
    return load(newest_complete(run.checkpoints)).tensors("model/")


class StopAt(Recorder):
    """Sends this process a signal after a step."""

    def __init__(self, step, number=signal.SIGTERM):
        super().__init__()
        self.at, self.number = step, number

    def step(self, report):
        super().step(report)
        if report.step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_resuming_gives_the_same_bits(tmp_path, number):
    whole, _ = run_training(tmp_path, "whole")
    cut, outcome = run_training(tmp_path, "cut", recorder=StopAt(3, number))
    assert (outcome.status, outcome.step, outcome.signal) == ("interrupted", 3, int(number))
    assert step_of(newest_complete(cut.checkpoints)) == 3
    resumed, outcome = run_training(tmp_path, "cut", resume=load(newest_complete(cut.checkpoints)))
    assert outcome.status == "finished"
    assert digest(resumed) == digest(whole)
    columns = ["step", "tag", "value", "rank"]
    losses = [
        [row for row in read_metrics(run.metrics).select(columns).to_pylist() if not row["tag"].startswith("perf/")]
        for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_the_digest_notices_one_more_step(tmp_path):
    short, _ = run_training(tmp_path, "short")
    longer, _ = run_training(tmp_path, "longer", config=tiny_config(train={"steps": 7}))
    assert digest(short) != digest(longer)


def test_micro_batches_change_the_update_by_rounding_only(tmp_path):
    """1, 2 and 4 micro-batches. Muon's iteration amplifies rounding, so AdamW's ε is raised and Muon left out."""
    results = []
    for micro in (4, 2, 1):
        config = tiny_config(
            train={"micro_batch_size": micro, "steps": 2},
            optim={"dense_optimizer": "adamw", "expert_optimizer": "adamw", "eps": 1e-3},
        )
        run, outcome = run_training(tmp_path, f"micro{micro}", config=config)
        results.append((outcome.loss, weights(run)))
    for loss, tensors in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=2e-6, msg=name)


def test_a_checkpoint_is_saved_before_every_evaluation(tmp_path, recorder):
    def evaluate(model: Transformer):
        assert not model.training
        return {"val/loss": 1.0, "val/bpb": 2.0}

    run_training(tmp_path, recorder=recorder, evaluate=evaluate, evaluate_every=2)
    assert [step for step, _ in recorder.evaluations] == [2, 4, 6]
    for step in (2, 4, 6):
        assert recorder.events.index(f"checkpoint {step}") < recorder.events.index(f"evaluation {step}")


def test_a_failed_evaluation_is_reported_and_training_goes_on(tmp_path, recorder):
    def evaluate(model: Transformer):
        raise RuntimeError("no such thing")

    _, outcome = run_training(tmp_path, recorder=recorder, evaluate=evaluate, evaluate_every=3)
    assert outcome.status == "finished"
    assert len(recorder.messages) == 2
    assert "no such thing" in recorder.messages[0]


def test_the_target_loss_ends_the_run(tmp_path, recorder):
    losses = iter([3.0, 1.4, 1.0])
    config = tiny_config(train={"target_loss": 1.5})
    _, outcome = run_training(
        tmp_path, config=config, recorder=recorder, evaluate=lambda model: {"val/loss": next(losses)}, evaluate_every=2
    )
    assert (outcome.status, outcome.step) == ("target_reached", 4)
    assert step_of(newest_complete(RunFolder(tmp_path, "run").checkpoints)) == 4


def test_evaluation_moves_neither_loads_nor_biases(tmp_path):
    def evaluate(model: Transformer):
        tokens = torch.arange(48).view(2, 24)
        model.score(tokens, tokens)
        return {}

    plain, _ = run_training(tmp_path, "plain")
    measured, _ = run_training(tmp_path, "measured", evaluate=evaluate, evaluate_every=1)
    assert digest(plain) == digest(measured)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_is_not_applied_and_says_where(tmp_path, monkeypatch, what, late):
    """Nor is any step after it, though the host learns of it late."""
    original, config = Transformer.training_loss, tiny_config(checkpoint={"every": 1, "keep": 10})
    poison = torch.from_numpy(RandomTokens(config.model.vocab_size, config.train.seq_len).batch(10, 2))

    def poisoned(self, sample, n_tokens, **options):
        loss = original(self, sample, n_tokens, **options)
        if not torch.equal(sample, poison):  # step 3, second micro-batch
            return loss
        if what == "loss":
            return loss._replace(total=loss.total * float("nan"), next_token=loss.next_token * float("nan"))
        return loss._replace(total=loss.total + _infinite_gradient(self.norm.weight))

    monkeypatch.setattr(Transformer, "training_loss", poisoned)
    monkeypatch.setitem(STEPS_LATE, "cpu", late)
    if late:
        config = tiny_config(checkpoint={"every": 2, "keep": 10})  # none between the bad step and its discovery
    recorder = Recorder()
    with pytest.raises(NonFiniteError, match=f"step 3: .* in the {what}") as caught:
        run_training(tmp_path, config=config, recorder=recorder)
    run = RunFolder(tmp_path, "run")
    assert [step_of(path) for path in list_complete(run.checkpoints)] == ([2] if late else [1, 2])
    assert [report.step for report in recorder.steps] == [1, 2]
    if what == "loss":
        assert "micro-batch 1, samples 10 to 11" in str(caught.value)
    else:
        assert "of norm.weight." in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "schedule", "told"),
    [
        (6, {}, None),  # two up, two flat, two down
        (5, {}, "The run ends at step 5, and learning rates would fall from step 5 to 6 ([schedule])"),
        (
            8,
            {},
            "Learning rates are 0 from step 6 on ([schedule]), and the run goes on to step 8: "
            "set train.steps = 6, or more schedule.hold_tokens",
        ),
        (8, {"decay_floor": 0.1}, None),
        (8, {"decay_tokens": 0}, None),
    ],
)
def test_a_schedule_that_does_not_end_with_the_run_is_told(tmp_path, recorder, steps, schedule, told):
    run_training(tmp_path, config=tiny_config(train={"steps": steps}, schedule=schedule), recorder=recorder)
    assert recorder.messages == [told] * (told is not None)


def with_free_disk(monkeypatch, checkpoints: float):
    """The disk looks as if so many of the tiny run's checkpoints fitted, whatever is on it."""
    usage = shutil.disk_usage("/")
    need = folder_place.space_needed
    sizes = []

    def space_needed(*arguments):
        sizes.append(need(*arguments))
        return sizes[-1]

    monkeypatch.setattr(
        folder_place.shutil, "disk_usage", lambda path: usage._replace(free=int(checkpoints * sizes[-1]))
    )
    for module in (checkpointer_module, checkpoint_module):
        monkeypatch.setattr(module, "space_needed", space_needed)


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(tmp_path, monkeypatch, recorder):
    with_free_disk(monkeypatch, 0.9)
    with pytest.raises(DiskSpaceError, match="GB of free disk space"):
        run_training(tmp_path, recorder=recorder)
    assert recorder.steps == []
    recorder = Recorder()
    run_training(tmp_path, "unsaved", config=tiny_config(checkpoint={"enabled": False}), recorder=recorder)
    assert (len(recorder.steps), recorder.messages) == (6, [])


@pytest.mark.parametrize(
    ("room", "every", "told"),
    [
        (3.5, 1, False),  # two are kept, and a third is written
        (2.5, 1, True),
        (2.5, 3, False),  # steps 3 and 6
        (1.5, 3, True),
        (1.5, None, False),
    ],
)
def test_a_disk_with_room_for_too_few_checkpoints_is_told(tmp_path, monkeypatch, recorder, room, every, told):
    with_free_disk(monkeypatch, room)
    run_training(tmp_path, config=tiny_config(checkpoint={"every": every, "keep": 2}), recorder=recorder)
    assert len(recorder.steps) == 6
    at_once = 3 if every == 1 else 2
    message = (
        f"The disk has room for {int(room)} of this run's checkpoints, and {at_once} will stand there at once, with "
        "the one that is being written: free some, or set a smaller checkpoint.keep"
    )
    assert recorder.messages == [message] * told


def test_a_full_disk_is_no_reason_not_to_end_a_run_that_was_saved(tmp_path, monkeypatch):
    run_training(tmp_path)
    with_free_disk(monkeypatch, 0.0)
    resume = load(newest_complete(RunFolder(tmp_path, "run").checkpoints))
    _, outcome = run_training(tmp_path, resume=resume)
    assert (outcome.status, outcome.step) == ("finished", 6)


def test_steps_that_are_verified_have_the_same_bits(tmp_path):
    plain, _ = run_training(tmp_path, "plain")
    verified, _ = run_training(tmp_path, "verified", config=tiny_config(train={"verify_every": 2, "verify_times": 3}))
    assert digest(verified) == digest(plain)


@pytest.mark.parametrize("disturbed", [None, 7, 10, 12])
def test_gradients_that_have_other_bits_the_second_time_end_the_run(tmp_path, monkeypatch, disturbed):
    """Of two micro-batches a step, the 7th and 8th are step 4's; its gradients are then computed twice more. Wherever
    it was that one went wrong, nothing of the step is applied."""
    original, calls = Transformer.training_loss, []

    def training_loss(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        calls.append(None)
        if len(calls) != disturbed:
            return loss
        return loss._replace(total=loss.total + 1e-4 * self.layers[1].attn_norm.weight[3])

    monkeypatch.setattr(Transformer, "training_loss", training_loss)
    config = tiny_config(train={"verify_every": 4, "verify_times": 2}, checkpoint={"every": 1, "keep": 10})
    if disturbed is None:
        run_training(tmp_path, config=config)
        assert len(calls) == 2 * 6 + 2 * 2
        return
    with pytest.raises(NotReproducibleError, match=r"step 4: .* on rank 0, of layers\.1\.attn_norm\.weight\. "):
        run_training(tmp_path, config=config)
    assert [step_of(path) for path in list_complete(RunFolder(tmp_path, "run").checkpoints)] == [1, 2, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_missing_gpu_is_told_before_anything_is_made(tmp_path, kernels):
    config = tiny_config(runtime={"device": "cuda", "kernels": kernels, "precision": "bf16"})
    with pytest.raises(UnsupportedArchError, match="expected a CUDA GPU, found none"):
        run_training(tmp_path, config=config)
    assert not RunFolder(tmp_path, "run").checkpoints.exists()


@pytest.mark.parametrize("every", [1, 4])
def test_reading_a_step_late_changes_nothing(tmp_path, monkeypatch, every):
    config = tiny_config(checkpoint={"every": every, "keep": 10})
    prompt, recorders = [], []
    for late in (0, 1):
        monkeypatch.setitem(STEPS_LATE, "cpu", late)
        recorders.append(Recorder())
        run, outcome = run_training(tmp_path, f"late{late}", config=config, recorder=recorders[-1])
        prompt.append((digest(run), outcome, [(r.step, r.loss, r.grad_norm, r.lr) for r in recorders[-1].steps]))
    assert prompt[0] == prompt[1]
    for recorder in recorders:
        for step in recorder.checkpoints:
            assert recorder.events.index(f"step {step}") < recorder.events.index(f"checkpoint {step}")


def test_a_world_of_another_size_is_refused(tmp_path):
    with pytest.raises(WorldSizeError, match=r"expected runtime\.world_size = 2 ranks, found 1"):
        run_training(tmp_path, config=tiny_config(runtime={"world_size": 2}))


def test_samples_are_asked_for_one_micro_batch_after_the_other(tmp_path):
    """In the order of the global batch, each once."""
    asked = []

    class Noted(RandomTokens):
        def batch(self, cursor, count):
            asked.extend(range(cursor, cursor + count))
            return super().batch(cursor, count)

    run_training(tmp_path, batches=Noted(61, 24))
    assert asked == list(range(6 * 4))


class Documents:
    """A document ends with the token 3; targets are hidden where asked for."""

    def __init__(self, *, masking=False, hides=None):
        self.masking, self.hides = masking, hides

    def starts(self, sample):
        if not self.masking:
            return None
        after = np.where(sample[:, :-1] == 3, np.arange(1, sample.shape[1]), 0)
        return np.maximum.accumulate(np.pad(after, ((0, 0), (1, 0)))[:, :-1], axis=1).astype(np.int32)

    def targets(self, sample):
        return None if self.hides is None else np.where(self.hides(sample[:, 1:]), -100, sample[:, 1:])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("masking", [False, True])
def test_the_loss_is_the_mean_over_the_targets_that_count_within_documents(
    tmp_path, recorder, masking, micro_batch_size
):
    """Within documents or not, and whatever the micro-batches, of which each has another number of targets."""
    config = tiny_config(
        train={"steps": 1, "micro_batch_size": micro_batch_size}, model={"mtp_depth": 0, "seq_balance_loss": 0.0}
    )
    documents = Documents(masking=masking, hides=lambda target: target < 5)
    run_training(tmp_path, config=config, recorder=recorder, documents=documents)
    sample = RandomTokens(61, 24).batch(0, 4)
    target, start = documents.targets(sample), documents.starts(sample)
    transport = open_transport(config.rdep, alone("cpu"), max_tokens=96, dtype=torch.float32)
    model = Transformer.build(
        config.model, select_ops("reference", "cpu"), transport, device="cpu", dtype=torch.float32, seed=0
    ).eval()
    with torch.no_grad():
        nll = model.score(
            torch.from_numpy(sample[:, :-1]),
            torch.from_numpy(target),
            document_start_BS=None if start is None else torch.from_numpy(start),
        )
        elsewhere = model.score(torch.from_numpy(sample[:, :-1]), torch.from_numpy(target))
    assert recorder.steps[0].loss == pytest.approx(float(nll) / (target >= 0).sum(), rel=1e-5)
    assert (abs(float(nll) - float(elsewhere)) > 1e-3) == masking


def test_hiding_nothing_changes_no_more_than_rounding(tmp_path):
    losses = []
    for documents in (None, Documents(hides=lambda target: target < 0)):
        config = tiny_config(train={"steps": 3}, optim={"dense_optimizer": "adamw", "expert_optimizer": "adamw"})
        recorder = Recorder()
        run_training(tmp_path, str(documents is None), config=config, recorder=recorder, documents=documents)
        losses.append([step.loss for step in recorder.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_hidden_targets_change_the_update(tmp_path):
    plain, _ = run_training(tmp_path, "plain")
    hiding, _ = run_training(tmp_path, "hiding", documents=Documents(hides=lambda target: target == 3))
    assert digest(plain) != digest(hiding)


def test_a_step_without_any_target_changes_no_weight_by_a_nan(tmp_path):
    run, outcome = run_training(tmp_path, documents=Documents(hides=lambda target: target >= 0))
    assert outcome.loss == 0.0
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_the_checkpoint_counts_what_was_taken_not_what_was_read_ahead(tmp_path):
    asked = []

    class Noted(RandomTokens):
        def batch(self, cursor, count):
            asked.append(cursor)
            return super().batch(cursor, count)

    config = tiny_config(train={"steps": 50})
    run, outcome = run_training(tmp_path, config=config, batches=Noted(61, 24), recorder=StopAt(3))
    assert max(asked) >= 4 * outcome.step, "something was read ahead"
    assert load(newest_complete(run.checkpoints)).document("progress")["cursor"] == 4 * outcome.step


def _infinite_gradient(weight):
    """Zero, with an infinite derivative."""
    return (weight - weight.detach()).abs().sum().sqrt()


def test_a_changed_identity_is_refused_with_old_and_new(tmp_path):
    cut, _ = run_training(tmp_path, "cut", recorder=StopAt(2))
    with pytest.raises(IdentityMismatchError, match="key: the run has 1, now 2"):
        run_training(tmp_path, "cut", identity={"key": 2}, resume=load(newest_complete(cut.checkpoints)))


def test_starting_from_weights_takes_them_and_counts_from_zero(tmp_path, recorder):
    first, _ = run_training(tmp_path, "first")
    source = load(newest_complete(first.checkpoints))
    config = tiny_config(
        train={"steps": 1},
        optim={"lr_dense": 1e-12, "lr_router": 1e-12, "lr_expert": 1e-12},
        model={"router_bias_update_rate": 0.0},
    )
    second, outcome = run_training(tmp_path, "second", config=config, recorder=recorder, start_from=source)
    assert outcome.step == 1
    old, new = source.tensors("model/"), weights(second)
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)


def test_metrics_hold_every_tag_of_every_step(tmp_path):
    run, _ = run_training(tmp_path)
    rows = read_metrics(run.metrics).to_pylist()
    steps_by_tag = {}
    for row in rows:
        steps_by_tag.setdefault(row["tag"], []).append(row["step"])
    router = {f"router/{layer}/{figure}" for layer in ("1", "2", "mtp0")
              for figure in ("load_entropy", "max_over_mean", "dead_experts", "bias_range")}  # fmt: skip
    assert router | {"train/loss", "train/lr", "train/grad_norm", "perf/ms_step", "perf/tokens_per_s"} <= set(
        steps_by_tag
    )
    assert all(steps == [1, 2, 3, 4, 5, 6] for steps in steps_by_tag.values())


def test_the_loss_falls(tmp_path):
    run, _ = run_training(tmp_path, config=tiny_config(train={"steps": 40}, schedule={"hold_tokens": 10**6}))
    losses = {row["step"]: row["value"] for row in read_metrics(run.metrics, tags=["train/loss"]).to_pylist()}
    assert losses[40] < losses[1] - 1.0


def test_a_profile_holds_the_named_ranges(tmp_path):
    run, _ = run_training(tmp_path, profile=(2, 3))
    trace = (run.path / "profile" / "trace.json").read_text()
    assert all(f'"{name}"' in trace for name in ("forward", "backward", "update"))


def test_an_evaluation_that_a_kill_forestalled_is_made_good_at_resume(tmp_path, recorder):
    run, _ = run_training(tmp_path)  # as if killed between the last step's save and its evaluation
    checkpoint = load(newest_complete(run.checkpoints))
    measured = {"val/loss": 1.5}
    _, outcome = run_training(tmp_path, recorder=recorder, resume=checkpoint, evaluate=lambda model: measured)
    assert (outcome.status, outcome.evaluation) == ("finished", measured)
    assert recorder.evaluations == [(6, measured)]
    again = Recorder()
    run_training(tmp_path, recorder=again, resume=checkpoint, evaluate=lambda model: measured)
    assert again.evaluations == [], "what was measured is not measured again"


def test_nothing_is_saved_where_that_is_asked_for(tmp_path):
    run, outcome = run_training(tmp_path, config=tiny_config(checkpoint={"enabled": False, "every": 2}))
    assert outcome.status == "finished"
    assert not list_complete(run.checkpoints)


@pytest.mark.parametrize(("old", "new"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_starting_from_weights_keeps_exact_masters_across_precisions(tmp_path, old, new):
    parent, _ = run_training(tmp_path, "parent", config=tiny_config(runtime={"precision": old}))
    source = load(newest_complete(parent.checkpoints))
    frozen = {"lr_dense": 1e-30, "lr_router": 1e-30, "lr_expert": 1e-30}
    config = tiny_config(runtime={"precision": new}, train={"steps": 1}, optim=frozen)
    child, _ = run_training(tmp_path, "child", config=config, start_from=source)
    result = load(newest_complete(child.checkpoints))
    for name in ("embed.weight", "layers.1.ffn.experts.w13", "norm.weight"):
        assert torch.equal(master(source, name), master(result, name)), name


def master(folder, name):
    weight, residual = f"model/{name}", f"optimizer/{name}/residual"
    if residual in folder.names:
        return join_master(folder.tensor(weight), folder.tensor(residual))
    return folder.tensor(weight)
