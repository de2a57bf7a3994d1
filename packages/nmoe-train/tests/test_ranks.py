"""Training on 2 and 4 ranks against one rank: the same update but for rounding, the same end, the same checkpoints."""

import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from nmoe.train.checkpointer import load, newest_complete, step_of
from nmoe.train.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("training_ranks.py")
RUNS = [name for name in runpy.run_path(str(SCRIPT))["RUNS"] if name != "experts_bf16"]
"""Of bf16, what owners return is rounded once an owner: other ranks give another, equally good, sum."""
JOBS = [
    *(f"whole:{name}" for name in RUNS),
    "longer:experts_bf16",
    "resumed:experts_bf16",
    "started:experts_bf16",
    "stopped:experts",
    "faulty:adamw",
    *(f"refused:{what}" for what in ("loss", "gradient", "bits")),
]
LIMIT_S = 600


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which 2, 1 and 4 ranks have done all jobs: one and four resume what two have made."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, SCRIPT, folder, "2,1,4", *JOBS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(f"{log.name}: {log.read_text()}" for log in sorted(folder.glob("*.log"))))
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, said
    return folder


def found(done, size, job):
    return json.loads((done / str(size) / f"{job}.json").read_text())


def checkpoint(done, size, run, step=None):
    folder = RunFolder(done / str(size), run).checkpoints
    return load(newest_complete(folder) if step is None else folder / f"step_{step:08}")


def tensors(folder):
    return {name: folder.tensor(name) for name in folder.names}


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_make_the_update_of_one_rank(done, name, size):
    """Losses and norm to fp32 rounding, of the first step and of the second, which sees the first update; weights,
    moments and router biases after both."""
    alone, shared = (found(done, ranks, f"whole:{name}") for ranks in (1, size))
    assert shared["status"] == "finished"
    for step in (0, 1):
        assert shared["steps"][step] == pytest.approx(alone["steps"][step], rel=1e-5)
    one, many = (tensors(checkpoint(done, ranks, name)) for ranks in (1, size))
    assert {key: (t.shape, t.dtype) for key, t in one.items()} == {key: (t.shape, t.dtype) for key, t in many.items()}
    # Muon's iteration amplifies rounding.
    rtol, atol = 1e-4, 2e-5 if "muon" in name else 2e-6
    for key, expected in one.items():
        torch.testing.assert_close(
            many[key], expected, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_the_comparison_notices_a_missing_rank(done):
    """Gradients of half of the batch, or a norm of one rank's parts, are far from these bounds."""
    one, clipped = (tensors(checkpoint(done, 1, name)) for name in ("adamw", "clipped"))
    assert not torch.allclose(one["model/norm.weight"], clipped["model/norm.weight"], rtol=1e-4, atol=2e-6)
    assert found(done, 1, "whole:clipped")["steps"][0][1] > 10 * 0.05, "it is clipped"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["experts_recomputed", "experts_verified"])
def test_recomputed_layers_and_verified_steps_give_the_same_bits(done, name, size):
    plain, again = (tensors(checkpoint(done, size, run)) for run in ("experts", name))
    assert same_bits(plain, again)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_two_ranks_checkpoint_goes_on_with_any_number_of_them(done, size):
    """What is restored is what was saved, to the bit; and so is, at equal ranks, what comes of it. The run that went
    straight on was evaluated, which changes nothing."""
    source = tensors(checkpoint(done, 2, "longer-experts_bf16", 2))
    again = tensors(load(newest_complete(done / str(size) / "again-experts_bf16")))
    assert same_bits(source, again)
    went_on, whole = checkpoint(done, size, "resumed-experts_bf16"), checkpoint(done, 2, "longer-experts_bf16")
    assert (step_of(went_on.path), step_of(whole.path)) == (4, 4)
    assert same_bits(tensors(went_on), tensors(whole)) == (size == 2)
    straight = found(done, 2, "longer:experts_bf16")["steps"][2:]
    for one, other in zip(found(done, size, "resumed:experts_bf16")["steps"], straight, strict=True):
        assert one == pytest.approx(other, rel=2**-8)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_another_run_starts_from_exact_masters_whatever_the_ranks(done, size):
    source = tensors(checkpoint(done, 2, "longer-experts_bf16", 2))
    started = tensors(checkpoint(done, size, "started-experts_bf16"))
    names = [name for name in source if name.startswith("model/") or name.endswith("/residual")]
    names = [name for name in names if not name.endswith("router.bias")]  # which a step moves
    assert same_bits({name: source[name] for name in names}, {name: started[name] for name in names})


@pytest.mark.parametrize("size", [2, 4])
def test_a_fault_of_the_transport_ends_all_ranks_at_its_step(done, size):
    ended = found(done, size, "faulty:adamw")
    *others, faulty = ended["ranks"]
    assert faulty.startswith("CapacityError: ")
    assert all(told.startswith("PeerFaultError: step 3: ") and f"on rank {size - 1}" in told for told in others)
    assert ended["saved"] == 2, "the step was not applied"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_signal_on_one_rank_stops_all_at_the_same_step(done, size):
    """It comes while step 3 is prepared: one rank ends after it, several once they have read the figures of step 3,
    which are a step late."""
    ended = found(done, size, "stopped:experts")
    last = 3 if size == 1 else 4
    assert (ended["status"], ended["signal"]) == ("interrupted", 15)
    assert ended["steps_of_ranks"] == [last] * size
    assert step_of(checkpoint(done, size, "stopped-experts").path) == last


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("what", ["loss", "gradient", "bits"])
def test_what_is_refused_on_one_rank_leaves_all_unchanged(done, what, size):
    """Not finite, or of other bits the second time. All name the sample, or the parameter; step 4 was made on all by
    then, and changed nothing either."""
    ended = found(done, size, f"refused:{what}")
    assert ended["saved"] == 2
    where = "micro-batch 5, samples 21 to 21" if what == "loss" else "of norm.weight."
    for rank in ended["ranks"]:
        assert "step 3: " in rank["message"]
        assert where in rank["message"]
        assert rank["same"], "weights, residuals and moments are those of step 2"
    assert len(ended["ranks"]) == size
