"""`n eval` with tasks, and tasks while a run trains: tables, files, rows in the database, and what is refused."""

import csv
import dataclasses
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nmoe.cli import eval_training
from nmoe.cli.app import run
from nmoe.cli.config import load_config
from nmoe.cli.console import make_console
from nmoe.cli.context import Context
from nmoe.cli.eval_inputs import open_text, token_bytes, windows_of
from nmoe.cli.eval_progress import _Pace
from nmoe.cli.eval_report import results_folder
from nmoe.cli.eval_request import EvalRequest
from nmoe.cli.eval_training import measure_suites
from nmoe.data.loader import validation_batches
from nmoe.data.shards import ShardSet
from nmoe.data.tokenizers import ByteTokenizer
from nmoe.eval.generation_tasks import Gsm8k
from nmoe.eval.results import Results
from nmoe.rdep.errors import PeerTimeoutError
from nmoe.rdep.world import World
from nmoe.train.experiments import Experiments
from nmoe.train.metrics import read_metrics

COPA = [
    {"query": f"The {name} fell, therefore", "gold": number % 2, "choices": ["it broke.", "it flew."]}
    for number, name in enumerate(["cup", "jug", "box", "pen", "jar"])
]


@pytest.fixture
def train(n, config_file, prepared):
    """Trains the small configuration; returns what `n train` did."""
    path = config_file()

    def call(*options, steps=2):
        sets = [f"data.path={prepared}", "runtime.threads=1", f"train.steps={steps}", *options]
        return n("train", path, *(part for each in sets for part in ("--set", each)), "--run-id", "first")

    return call


@pytest.fixture
def trained(train):
    outcome = train("checkpoint.every=1")
    assert outcome.code == 0, outcome.err
    return "first"


@pytest.fixture
def bundle(tmp_path):
    """Two tasks of CORE, one without its data, and five questions of GSM8K."""
    folder = tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    tasks = [("copa", "copa.jsonl"), ("lost", "lost.jsonl")]
    entries = [
        f"-\n  label: {label}\n  dataset_uri: {uri}\n  num_fewshot: [0]\n  icl_task_type: multiple_choice\n"
        for label, uri in tasks
    ]
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopa,50\nlost,25\n")
    write(folder / "eval_data" / "copa.jsonl", COPA)
    write(folder / "gsm8k_test.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(7)])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stored(data_root, *arguments):
    with Experiments(data_root / "experiments.db") as experiments:
        return list(experiments.evaluations(*arguments))


# ---- `n eval` ------------------------------------------------------------------------------------------------------


def test_the_list_names_every_task_and_needs_no_model(n):
    outcome = n("eval", "--list")
    assert outcome.code == 0
    named = [line.split()[0] for line in outcome.out.splitlines()]
    assert {"validation", "bpb", "core", "mmlu", "hellaswag", "gsm8k", "humaneval", "gpqa"} <= set(named)


def test_results_are_a_table_files_and_rows(n, trained, bundle, data_root):
    outcome = n("eval", trained, "--tasks", "core/copa,gsm8k:1", "--data", bundle, "--limit", "3")
    assert outcome.code == 0, outcome.err
    (folder,) = (data_root / "runs" / trained / "eval" / "step_00000002").iterdir()
    assert folder.name.startswith(f"core.copa+gsm8k-1-first-3-of-{bundle.name}-")
    assert str(folder) in outcome.out
    table = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["task"], row["shots"], row["n"]) for row in table] == [
        ("core/copa", "0", "3"), ("gsm8k", "1", "3"), ("gsm8k", "1", "3"),
    ]  # fmt: skip
    document = json.loads((folder / "results.json").read_text())
    assert document["model"].endswith("step_00000002")
    assert document["about"]["max_length"] == 16
    examples = [json.loads(line) for line in (folder / "examples" / "gsm8k.jsonl").read_text().splitlines()]
    assert len(examples) == 3
    assert all("Question:" in example["prompt"] and len(example["choices"]) == 1 for example in examples)
    rows = stored(data_root, trained)
    assert [(row.task, row.metric, row.step, row.example_limit, row.examples) for row in rows] == [
        ("core/copa", table[0]["metric"], 2, 3, 3), ("gsm8k", "exact_match", 2, 3, 3),
        ("gsm8k", "flexible_extract", 2, 3, 3),
    ]  # fmt: skip
    assert [row.value for row in rows] == [float(row["value"]) for row in table]
    assert all(re.fullmatch("[0-9a-f]{64}", row.data_sha256) and row.tokenizer.startswith("byte ") for row in rows)
    for row in rows:
        assert re.search(rf"{row.task} .*{row.metric} +{row.value:.4f} ± {row.stderr:.4f}", outcome.out)
    # Asked again, the same figures stand once; of another checkpoint, beside them.
    assert n("eval", trained, "--tasks", "core/copa,gsm8k:1", "--data", bundle, "--limit", "3").code == 0
    assert [row.value for row in stored(data_root, trained)] == [row.value for row in rows]
    assert n("eval", f"{trained}@1", "--tasks", "core/copa", "--data", bundle, "--limit", "3").code == 0
    assert {row.step for row in stored(data_root, trained, "core/copa")} == {1, 2}


def test_missing_data_is_listed_or_makes_the_score_partial(n, trained, bundle, data_root, tmp_path):
    outcome = n("eval", trained, "--tasks", "core", "--data", bundle)
    assert outcome.code == 3
    assert "lost" in outcome.err
    assert str(bundle / "eval_data" / "lost.jsonl") in outcome.err
    outcome = n("eval", trained, "--tasks", "core", "--data", bundle, "--allow-missing", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "partial (1/2)" in outcome.out
    assert (tmp_path / "out" / "results.csv").is_file()
    core = stored(data_root, trained, "core")
    assert [(row.note, row.shots, row.metric) for row in core] == [("partial (1/2)", None, "centered")]
    assert re.fullmatch("[0-9a-f]{64}", core[0].data_sha256)


def test_the_data_root_is_looked_at_where_no_folder_is_named(n, trained, bundle, data_root):
    bundle.rename(data_root / "eval_bundle")
    assert n("eval", trained, "--tasks", "core/copa").code == 0


def test_an_imported_model_is_measured(n, trained, bundle, data_root, tmp_path):
    assert n("export", trained, "--output", tmp_path / "hf").code == 0
    assert n("import", tmp_path / "hf", "--output", tmp_path / "model").code == 0
    options = ["--tasks", "core/copa", "--data", bundle]
    assert "--seq-len" in n("eval", tmp_path / "model", *options).err
    outcome = n("eval", tmp_path / "model", *options, "--seq-len", "16")
    assert outcome.code == 0, outcome.err
    assert n("eval", trained, *options).code == 0
    mine, theirs = stored(data_root)
    assert (mine.model, mine.step) == (str(tmp_path / "model"), None)
    assert (theirs.model, theirs.step, theirs.value) == ("first", 2, mine.value)
    (folder,) = (tmp_path / "model" / "eval").iterdir()
    assert (folder / "results.json").is_file()
    assert n("generate", tmp_path / "model", "--prompt", "x", "--max-tokens", "2").code == 0, "it is still a model"


def test_validation_stands_beside_tasks(n, trained, bundle, data_root):
    bundle.rename(data_root / "eval_bundle")
    outcome = n("eval", trained, "--tasks", "validation,core/copa,bpb")
    assert outcome.code == 0, outcome.err
    assert "val/bpb" in outcome.out
    assert {row.task for row in stored(data_root)} == {"core/copa", "bpb"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["first", "--tasks", "core,mmul"], 2, "did you mean 'mmlu'"),
        (["first", "--tasks", ","], 2, "--list"),
        ([], 2, "name a run"),
        (["first", "--tasks", "core", "--limit", "0"], 2, "--limit: expected 1 or more"),
        (["first", "--tasks", "core", "--max-tokens", "8", "--data", "BUNDLE", "--allow-missing"], 3, "--max-tokens"),
        (["first", "--tasks", "core,bpb", "--data", "BUNDLE"], 2, "once for each"),
        (["first", "--tasks", "core", "--data", "BUNDLE/none"], 2, "expected a folder"),
        (["first", "--tasks", "humaneval", "--data", "BUNDLE"], 5, "--unsafe-exec"),
    ],
)
def test_what_cannot_be_measured_is_refused(n, trained, bundle, tmp_path, monkeypatch, options, code, said):
    problem = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
    write(bundle / "HumanEval.jsonl", [problem])
    monkeypatch.setenv("PATH", str(tmp_path))  # no bubblewrap there
    outcome = n("eval", *(option.replace("BUNDLE", str(bundle)) for option in options))
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err


def test_programs_run_unconfined_if_asked_to(n, trained, bundle):
    problem = {"task_id": "0", "prompt": "def f():\n    return 1\n", "entry_point": "f", "test": "def check(f): pass"}
    write(bundle / "HumanEval.jsonl", [problem])
    outcome = n("eval", trained, "--tasks", "humaneval", "--data", bundle, "--unsafe-exec")
    assert outcome.code == 0, outcome.err
    assert "pass@1" in outcome.out


def test_a_database_that_cannot_be_written_costs_no_result(n, trained, bundle, data_root):
    for file in data_root.glob("experiments.db*"):
        file.unlink()
    (data_root / "experiments.db").write_text("no database at all, but some text in its place")
    outcome = n("eval", trained, "--tasks", "core/copa", "--data", bundle)
    assert outcome.code == 0
    assert "results stand" in outcome.err
    assert list((data_root / "runs" / trained / "eval").rglob("results.csv"))


def test_folders_of_results_tell_what_was_asked_apart(tmp_path):
    bpb = [tmp_path / "x" / "val", tmp_path / "y" / "val", tmp_path / ("汉" * 80)]
    asked = [
        (["core"], None, {}), (["core"], 1, {}), (["core"], 1, {"limit": 5}), (["core", "mmlu"], 1, {}),
        (["core/a"], 1, {}), (["a" * 90, "b" * 90], 1, {}), (["a" * 90, "c" * 90], 1, {}), (["bpb"], 1, {}),
        (["bpb"], 1, {"seq_len": 64}), (["汉" * 60], 1, {"limit": 10**6, "seq_len": 10**6, "data": bpb[2]}),
        *((["bpb"], 1, {"limit": 5, "data": data}) for data in bpb),
    ]  # fmt: skip
    folders = [results_folder(tmp_path, step, names, **settings) for names, step, settings in asked]
    assert results_folder(tmp_path, 1, ["bpb"], limit=5, data=bpb[0] / ".." / "val") == folders[-3]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        folder.mkdir(parents=True)
        assert folder.parent in (tmp_path / "eval", tmp_path / "eval" / "step_00000001")


def test_the_bar_tells_the_time_left(monkeypatch):
    moments = iter([100.0, 100.0, 130.0, 150.0, 150.0])
    monkeypatch.setattr("nmoe.cli.eval_progress.time.monotonic", lambda: next(moments))
    pace = _Pace()
    assert pace.line("a", 0, 8) == "a  0%"
    assert pace.line("a", 2, 8) == "a  25%  1:30 left"
    assert pace.line("b", 0, 3) == "b  0%"


# ---- bits per byte -------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_a_run_are_those_of_its_validation_but_for_ends_of_text(n, trained, prepared, data_root):
    outcome = n("eval", trained, "--tasks", "validation,bpb")
    assert outcome.code == 0, outcome.err
    whole = float(re.search(r"val/bpb +([\d.]+) bits", outcome.out)[1])
    (row,) = stored(data_root, trained, "bpb")
    shards = ShardSet.open(prepared / "val")
    assert 0 < whole - row.value < 20 * shards.n_documents / shards.n_bytes
    assert row.data_sha256 == shards.fingerprint
    assert n("eval", trained, "--tasks", "bpb", "--data", prepared).code == 0
    assert stored(data_root, trained, "bpb")[0].value == row.value
    assert n("eval", trained, "--tasks", "bpb", "--data", prepared / "train").code == 0
    assert len(stored(data_root, trained, "bpb")) == 2


class Halves(ByteTokenizer):
    """Another tokenizer: two ids a byte."""

    name = "halves"

    def __init__(self):
        super().__init__()
        self.name, self.eos_id, self.n_vocab = "halves", 16, 17

    @property
    def fingerprint(self):
        return "0" * 64

    def encode(self, text):
        return [half for byte in text.encode() for half in divmod(byte, 16)]

    def encode_batch(self, texts):
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_set_of_another_tokenizer_is_read_as_text(prepared, batch):
    shards = ShardSet.open(prepared / "val")
    text = open_text(prepared, Halves(), 16, batch)
    targets = np.concatenate([targets.ravel() for _, targets in text.windows.batches()])
    inputs = np.concatenate([inputs.ravel() for inputs, _ in text.windows.batches()])
    targets = targets[targets != -100]
    documents = [ByteTokenizer().decode(shards.document(number)) for number in range(shards.n_documents)]
    expected = [id for document in documents for id in [*Halves().encode(document), 16]]
    assert targets.tolist() == expected
    assert inputs[: len(expected)].tolist() == [16, *expected[:-1]]
    assert text.fingerprint == shards.fingerprint


@pytest.mark.parametrize("batch", [1, 4])
def test_windows_are_those_of_a_shard_set(prepared, batch):
    shards = ShardSet.open(prepared / "val")
    documents = [shards.document(number)[:-1].tolist() for number in range(shards.n_documents)]
    mine = list(windows_of(iter(documents), shards.eos_id, 16, batch))
    theirs = list(validation_batches(shards, 16, batch))
    assert len(mine) == len(theirs)
    for (x, y), (a, b) in zip(mine, theirs, strict=True):
        assert np.array_equal(x, a)
        assert np.array_equal(y, b)


def test_every_byte_is_one_token_of_the_byte_tokenizer():
    assert token_bytes(ByteTokenizer()).tolist() == [1] * 256 + [0]


# ---- while a run trains --------------------------------------------------------------------------------------------


def values(data_root, tag):
    rows = read_metrics(data_root / "runs" / "first" / "metrics", tags=[tag]).to_pylist()
    return {row["step"]: row["value"] for row in rows}


def test_tasks_are_measured_as_often_as_validation(n, train, bundle, data_root):
    settings = ('eval.tasks=["validation", "core/copa", "gsm8k:1"]', f"eval.data={bundle}", "eval.limit=2")
    outcome = train("eval.every=1", *settings)
    assert outcome.code == 0, outcome.err
    for tag in ("val/loss", "eval/gsm8k/exact_match"):
        assert set(values(data_root, tag)) == {1, 2}
    # What was measured is what `n eval` measures of the same checkpoint.
    assert n("eval", "first", "--tasks", "core/copa,gsm8k:1", "--data", bundle, "--limit", "2").code == 0
    rows = stored(data_root, "first")
    assert len(rows) == 6, "the second measurement of step 2 took the place of the first"
    copa = {row.step: row.value for row in rows if row.task == "core/copa"}
    found = next(tag for tag in ("eval/core/copa/accuracy", "eval/core/copa/acc") if values(data_root, tag))
    assert values(data_root, found) == copa
    for step in (1, 2):
        folder = data_root / "runs" / "first" / "eval" / f"step_{step:08d}" / "training"
        assert (folder / "results.csv").is_file()
        assert "eval/gsm8k/exact_match" in outcome.out


def test_tasks_without_validation_are_measured(train, bundle, data_root):
    outcome = train('eval.tasks=["core/copa"]', f"eval.data={bundle}")
    assert outcome.code == 0, outcome.err
    assert values(data_root, "val/loss") == {}
    assert [row.step for row in stored(data_root, "first")] == [2]


def test_an_evaluation_that_fails_is_told_and_training_goes_on(train, bundle, data_root, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(Gsm8k, "_judge", staticmethod(fail))
    settings = ('eval.tasks=["validation", "gsm8k:1"]', f"eval.data={bundle}", "eval.limit=2", "eval.every=1")
    outcome = train(*settings)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("gsm8k failed, and training goes on: ZeroDivisionError: nobody foresaw this") == 2
    assert set(values(data_root, "val/loss")) == {1, 2}, "what did not fail is kept"
    assert stored(data_root, "first") == []
    with Experiments(data_root / "experiments.db") as experiments:
        assert (experiments.get("first").status, experiments.get("first").step) == ("finished", 2)


def test_a_full_disk_costs_the_files_alone(train, bundle, data_root, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "write", full)
    outcome = train('eval.tasks=["core/copa"]', f"eval.data={bundle}")
    assert outcome.code == 0, outcome.err
    assert "could not be written" in outcome.out
    assert len(stored(data_root, "first")) == 1


def test_a_task_without_data_is_refused_before_a_run_is_made(train, bundle, data_root):
    outcome = train('eval.tasks=["core"]', f"eval.data={bundle}")
    assert outcome.code == 3
    assert "lost" in outcome.err
    assert not (data_root / "runs" / "first").exists()
    outcome = train('eval.tasks=["core"]', f"eval.data={bundle}", "eval.allow_missing=true")
    assert outcome.code == 0, outcome.err
    assert [row.note for row in stored(data_root, "first", "core")] == ["partial (1/2)"]


# ---- several ranks -------------------------------------------------------------------------------------------------


class Rank(World):
    """Threads that meet to share; the world of each rank."""

    def __init__(self, rank, values, barrier):
        super().__init__(rank, 3, torch.device("cpu"))
        self.values, self.barrier = values, barrier

    def share(self, name, value, timeout_s=None):
        self.values[self.rank] = value
        self.barrier.wait()
        return list(self.values)


@pytest.mark.parametrize("fails", [None, 0, 2])
def test_ranks_go_the_same_way_whichever_failed(config_file, monkeypatch, fails):
    config = load_config(config_file(), environ={}).config
    suites = [SimpleNamespace(tasks=[SimpleNamespace(name="copa")])]
    said, found, shared, barrier = [], [0] * 3, [b""] * 3, threading.Barrier(3, timeout=30)

    def evaluate(*arguments, world, **options):
        if world.rank == fails:
            raise ValueError("here alone")
        return Results((), tokenizer="t")

    monkeypatch.setattr(eval_training, "evaluate_suites", evaluate)

    def run(rank):
        reporter = SimpleNamespace(message=lambda text: said.append((rank, text)))
        found[rank] = measure_suites(None, None, suites, config, Rank(rank, shared, barrier), reporter)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if fails is None:
        assert all(isinstance(results, Results) for results in found)
        assert said == []
    else:
        assert found == [None] * 3
        assert {rank for rank, _ in said} == {0, 1, 2}
        assert all(f"rank {fails}: ValueError: here alone" in text for _, text in said)


def test_ranks_that_lost_one_another_do_not_go_on(config_file, monkeypatch):
    def evaluate(*arguments, **options):
        raise PeerTimeoutError(1, "dispatch", 1.0)

    monkeypatch.setattr(eval_training, "evaluate_suites", evaluate)
    config = load_config(config_file(), environ={}).config
    with pytest.raises(PeerTimeoutError):
        measure_suites(None, None, [], config, World(0, 1, torch.device("cpu")), SimpleNamespace())


def on_ranks(data_root, number):
    """Says in the run's configuration that it is one of so many ranks."""
    path = data_root / "runs" / "first" / "config.toml"
    text, changed = re.subn(r"world_size = \d+", f"world_size = {number}", path.read_text())
    assert changed == 1
    path.write_text(text)


def call_as_torchrun_does(data_root, n_ranks, *arguments):
    """Runs `n` as so many ranks, and returns what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(n_ranks):
        place = {**shared, "RANK": rank, "LOCAL_RANK": rank, "NMOE_DATA_PATH": data_root}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "nmoe.cli", *map(str, arguments)],
                env={**os.environ, **{name: str(value) for name, value in place.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * n_ranks, "\n".join(said)
    return said


def test_several_ranks_measure_what_one_measures(n, train, bundle, data_root, tmp_path):
    """Each has its part of the experts: their calls of the model must meet, in tasks of all kinds."""
    settings = ('eval.tasks=["core/copa", "gsm8k:1"]', f"eval.data={bundle}", "eval.limit=3", "eval.every=1")
    outcome = train(*settings, "runtime.world_size=2", "train.micro_batch_size=2")
    assert outcome.code == 0, outcome.err
    assert "failed" not in outcome.out
    assert len(stored(data_root, "first")) == 6
    while_training = data_root / "runs" / "first" / "eval" / "step_00000002" / "training" / "examples"

    bundle.rename(data_root / "eval_bundle")
    asked = ["eval", "first", "--tasks", "validation,bpb,core/copa,gsm8k:1", "--limit", "3", "--max-tokens", "32"]
    said = {}
    on_ranks(data_root, 1)
    outcome = n(*asked, "--out", tmp_path / "1")
    assert outcome.code == 0, outcome.err
    said[1] = outcome.out
    kept = stored(data_root, "first")
    said[2], nothing = call_as_torchrun_does(data_root, 2, *asked, "--out", tmp_path / "2")
    assert nothing == "", "rank 0 alone speaks"
    on_ranks(data_root, 4)
    outcome = n(*asked, "--out", tmp_path / "4")
    assert outcome.code == 0, outcome.err
    said[4] = outcome.out

    for name in ("core.copa", "gsm8k"):
        alone = (tmp_path / "1" / "examples" / f"{name}.jsonl").read_text().splitlines()
        assert len(alone) == 3
        for folder in (tmp_path / "2" / "examples", tmp_path / "4" / "examples", while_training):
            several = (folder / f"{name}.jsonl").read_text().splitlines()
            for found, expected in zip(map(json.loads, several), map(json.loads, alone), strict=True):
                # A token's sum over its experts is added up by those who own them.
                assert found["scores"] == pytest.approx(expected["scores"], rel=1e-5)
                assert {**found, "scores": None} == {**expected, "scores": None}
    for size in (2, 4):
        document = json.loads((tmp_path / str(size) / "results.json").read_text())
        assert document["about"]["ranks"] == size
        for figure in (r"val/loss +([\d.]+)", r"val/bpb +([\d.]+)", r"\nbpb .*bits_per_byte +([\d.]+)"):
            found, expected = (float(re.search(figure, text)[1]) for text in (said[size], said[1]))
            assert found == pytest.approx(expected, abs=2e-4), figure
        assert said[size].count("Results are in") == 1
    again = stored(data_root, "first")
    assert [(row.task, row.metric, row.step) for row in again] == [(row.task, row.metric, row.step) for row in kept]


def test_a_rank_that_fails_ends_all_with_its_own_traceback_first(n, trained, bundle, data_root):
    on_ranks(data_root, 2)
    out, err = io.StringIO(), io.StringIO()
    program = (sys.executable, str(Path(__file__).with_name("failing_eval_rank.py")))
    context = Context(data_root, {}, make_console(out), make_console(err), program=program)
    asked = ["eval", trained, "--tasks", "core/copa", "--data", str(bundle), "--max-tokens", "16"]
    began = time.monotonic()
    assert run(asked, context) == 1
    assert time.monotonic() - began < 120, "far from rdep.timeout_s"
    told = err.getvalue()
    assert told.startswith("Traceback")
    assert "RuntimeError: on purpose" in told.partition("Rank 1 of 2")[0]
    assert re.search(r"Rank 1 of 2 \(process \d+\) ended with exit code 1; ", told)
    assert "Results are in" not in out.getvalue()
    assert stored(data_root, trained) == []
    assert not list((data_root / "runs" / trained).rglob("results.csv"))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--gpus", "3"], 2, "4 experts divide"),
        (["--gpus", "2"], 5, "expected 2 visible GPUs"),
        (["--gpus", "0"], 2, "--gpus: expected 1 or more"),
        (["--gpus", "2", "--device", "cpu"], 2, "--device cpu"),
        (["--gpus", "2", "--kernels", "reference"], 2, "native kernels"),
    ],
)
def test_ranks_that_cannot_be_are_refused(n, trained, monkeypatch, options, code, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = n("eval", trained, *options)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err


def test_torchruns_ranks_are_the_ones_that_are_asked_for(trained, data_root):
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    err = io.StringIO()
    context = Context(data_root, place, make_console(io.StringIO()), make_console(err))
    assert run(["eval", trained, "--gpus", "2"], context) == 2
    assert "WORLD_SIZE=4" in err.getvalue()


def test_a_request_is_passed_on_whole():
    asked = EvalRequest(
        "r@2", ("core", "bpb"), 3, Path("d"), Path("o"), True, True, 64, "byte", 16, 4, "cuda", "native", 2
    )
    words = asked.arguments()
    assert words[:2] == ["eval", "r@2"]
    for field in dataclasses.fields(asked)[2:]:
        assert f"--{field.name.replace('_', '-')}" in words, "what is left out, ranks would not know"
