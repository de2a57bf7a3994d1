"""Evaluation on 1, 2 and 4 ranks: the same results, example by example, in as many calls on every rank."""

import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("eval_ranks.py")
LIMIT_S = 180
WORDS = ("the", "a", "red", "blue", "dog", "cat", "runs", "sleeps", "house", "tree")
SIZES = (1, 2, 4)


def say(rng, low=2, high=7):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_bundle(folder):
    """Tasks of all kinds and several sizes: most of them no multiple of 2 or 4 batches."""
    rng = random.Random(3)
    asked = [
        {"query": say(rng), "choices": [say(rng, 1, 3) + f" {i}" for i in range(3)], "gold": rng.randrange(3)}
        for _ in range(21)
    ]
    wino = []
    for _ in range(9):
        begin = say(rng)
        wino.append({"context_options": [begin + " x", begin + " y"], "continuation": say(rng, 1, 2), "gold": 1})
    lines = [{"context": say(rng), "continuation": say(rng, 1, 2)} for _ in range(13)]
    kinds = {
        "asked": ("multiple_choice", 3, asked),
        "wino": ("schema", 0, wino),
        "lines": ("language_modeling", 2, lines),
    }
    (folder / "eval_data").mkdir(parents=True)
    tasks, table = [], ["Eval Task,Random baseline"]
    for label, (kind, shots, rows) in kinds.items():
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [shots], "icl_task_type": kind})
        table.append(f"{label},25")
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")


def run_ranks(size, folder):
    """Runs the script on `size` ranks; the first failure ends all, and is told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"{size}-{rank}.log" for rank in range(size)]
    processes = []
    for rank in range(size):
        with logs[rank].open("wb") as log:
            command = [sys.executable, SCRIPT, str(rank), str(size), str(port), folder]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            assert not failed, f"rank {failed[0]} of {size}:\n{logs[failed[0]].read_text()}"
            assert time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
            time.sleep(0.05)
        for log, process in zip(logs, processes, strict=True):
            assert process.returncode == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_bundle(folder / "bundle")
    for size in SIZES:
        (folder / str(size)).mkdir()
        run_ranks(size, folder)

    def found(size, case, rank=0):
        return json.loads((folder / str(size) / f"{case}-{rank}.json").read_text())

    return found


@pytest.mark.parametrize("case", ["copies", "copies-one", "experts", "experts-one"])
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_the_same_results_after_as_many_calls(done, size, case):
    first = done(size, case)
    for rank in range(1, size):
        other = done(size, case, rank)
        assert other["examples"] == first["examples"]
        assert other["rows"] == first["rows"]
        assert other["calls"] == first["calls"], "a rank that calls less often would keep the others waiting"
    if case == "copies":
        assert first["calls"] < done(1, case)["calls"] or size == 1, "the work is divided"


@pytest.mark.parametrize("case", ["copies", "copies-one"])
@pytest.mark.parametrize("size", [2, 4])
def test_copies_of_the_model_give_the_bits_of_one(done, size, case):
    assert done(size, case)["examples"] == done(1, case)["examples"]
    assert done(size, case)["rows"] == done(1, case)["rows"]


@pytest.mark.parametrize("case", ["experts", "experts-one"])
@pytest.mark.parametrize("size", [2, 4])
def test_experts_on_several_ranks_give_the_same_results(done, size, case):
    """Gates travel in fp32, and a token's sum is added up by owners: scores agree to fp32, all else is the same."""
    for task, expected in zip(done(size, case)["examples"], done(1, case)["examples"], strict=True):
        assert len(task) == len(expected) > 0
        for found, one in zip(task, expected, strict=True):
            assert found["scores"] == pytest.approx(one["scores"], rel=1e-6)
            assert {**found, "scores": None} == {**one, "scores": None}
    assert done(size, case)["rows"] == done(1, case)["rows"]


@pytest.mark.parametrize("kind", ["copies", "experts"])
@pytest.mark.parametrize("size", SIZES)
def test_one_request_is_answered_on_every_rank(done, size, kind):
    for rank in range(size):
        assert done(size, f"{kind}-request", rank) == pytest.approx(done(1, "copies-request"), rel=1e-6)
