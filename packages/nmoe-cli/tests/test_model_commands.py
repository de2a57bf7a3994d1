"""`n eval`, `n generate` and `n import` around their main path, and what a start of training checks of its data."""

import base64
import json
import re
import shutil

import pytest
from nmoe.cli import composition, run_data
from nmoe.train.experiments import Experiments


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """What a model writes after its training would take longer than its training."""
    monkeypatch.setattr(composition, "SAMPLE_TOKENS", 8)


@pytest.fixture
def train(n, config_file, prepared):
    """Trains the small configuration; returns what `n train` did."""
    path = config_file()

    def call(*options):
        fixed = ["--set", f"data.path={prepared}", "--set", "runtime.threads=1"]
        steps = [] if any(str(option).startswith("train.steps") for option in options) else ["--set", "train.steps=2"]
        return n("train", path, *fixed, *steps, *options)

    return call


@pytest.fixture
def trained(train):
    """A finished run's name; it has checkpoints of steps 1 and 2."""
    outcome = train("--run-id", "first", "--set", "checkpoint.every=1")
    assert outcome.code == 0, outcome.err
    return "first"


@pytest.fixture
def row(data_root):
    def read():
        with Experiments(data_root / "experiments.db") as experiments:
            return experiments.get("first")

    return read


@pytest.fixture
def forgotten(trained, data_root):
    """The finished run, its recorded validation overwritten, so that a new record is seen."""
    with Experiments(data_root / "experiments.db") as experiments:
        experiments.update(trained, val_loss=99.0, val_bpb=99.0)
    return trained


def bpb(text):
    return float(re.search(r"val/bpb +([\d.]+) bits", text)[1])


# ---- what `n eval` records -----------------------------------------------------------------------------------------


def test_the_newest_checkpoint_on_the_runs_own_data_is_recorded(n, forgotten, row, data_root):
    outcome = n("eval", data_root / "runs" / forgotten / "checkpoints" / "step_00000002")
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == pytest.approx(bpb(outcome.out), abs=1e-4)


@pytest.mark.parametrize("change", ["older", "data", "seq_len"])
def test_a_measurement_that_is_not_the_runs_own_is_shown_and_not_recorded(n, forgotten, row, prepared, change):
    options = {
        "older": [f"{forgotten}@1"],
        "data": [forgotten, "--data", prepared],
        "seq_len": [forgotten, "--seq-len", "8"],
    }[change]
    outcome = n("eval", *options)
    assert outcome.code == 0, outcome.err
    assert bpb(outcome.out) > 0
    assert row().val_bpb == 99.0


@pytest.mark.parametrize("change", ["device", "bound"])
def test_a_measurement_made_otherwise_than_in_training_is_not_recorded(n, forgotten, row, data_root, change):
    config = data_root / "runs" / forgotten / "config.toml"
    # As if it had been trained on a GPU; as if training had scored one sequence.
    old, new = {
        "device": ('device = "cpu"', 'device = "cuda"'),
        "bound": ("[eval]", "[eval]\nmax_sequences = 1"),
    }[change]
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    outcome = n("eval", forgotten, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == 99.0


def test_data_that_were_replaced_are_not_recorded_as_the_runs_own(n, forgotten, row, prepared, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("something else entirely. " * 60)
    (tmp_path / "other" / "y.txt").write_text("and more of it. " * 60)
    shutil.rmtree(prepared)
    assert n("data", "prep", tmp_path / "other", "--output", prepared).code == 0
    outcome = n("eval", forgotten)
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == 99.0


def test_a_run_of_another_data_root_leaves_a_namesake_alone(n, forgotten, row, data_root, tmp_path):
    shutil.copytree(data_root / "runs", tmp_path / "elsewhere" / "runs")
    outcome = n("eval", tmp_path / "elsewhere" / "runs" / forgotten)
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == 99.0


def test_a_result_is_shown_where_the_database_has_no_row(n, trained, data_root):
    for file in data_root.glob("experiments.db*"):
        file.unlink()
    outcome = n("eval", trained)
    assert outcome.code == 0
    assert bpb(outcome.out) > 0
    assert "n runs" in outcome.err
    assert not (data_root / "experiments.db").exists()


def test_a_result_is_shown_where_the_database_is_damaged(n, trained, data_root):
    for file in data_root.glob("experiments.db*"):
        file.unlink()
    (data_root / "experiments.db").write_text("no database at all, but some text in its place")
    outcome = n("eval", trained)
    assert outcome.code == 0
    assert bpb(outcome.out) > 0


# ---- how a model is named ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("root/runs/first", "checkpoints/step_00000002"),
        ("root/runs/first/checkpoints", "step_00000002"),
        ("root/runs/first/checkpoints/step_00000002", "."),
        ("root/runs/first", "."),
        ("root/runs", "first"),
        ("root/runs", "first@2"),
        ("root/runs", "./first@2"),
        ("root", "runs/first"),
        ("root", "runs/first@2"),
        (".", "root/runs/first/checkpoints/step_00000002"),
        (".", "link"),
    ],
)
def test_a_run_is_found_from_any_folder(n, forgotten, row, data_root, tmp_path, monkeypatch, folder, name):
    (tmp_path / "link").symlink_to(data_root / "runs" / forgotten / "checkpoints" / "step_00000002")
    monkeypatch.chdir(tmp_path / folder)
    outcome = n("eval", name)
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == pytest.approx(bpb(outcome.out), abs=1e-4)  # found as this run's, so recorded


@pytest.mark.parametrize(("folder", "name"), [(".", "root/runs/first"), ("root/runs", "first"), ("root", "runs/first")])
def test_a_run_that_was_moved_and_linked_back_is_found(
    n, forgotten, row, data_root, tmp_path, monkeypatch, folder, name
):
    (data_root / "runs" / forgotten).rename(tmp_path / "moved")
    (data_root / "runs" / forgotten).symlink_to(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / folder)
    outcome = n("eval", name)
    assert outcome.code == 0, outcome.err
    assert row().val_bpb == pytest.approx(bpb(outcome.out), abs=1e-4)


def test_a_checkpoint_is_printed_as_it_was_given(n, trained, data_root, monkeypatch):
    monkeypatch.chdir(data_root / "runs" / trained)
    outcome = n("eval", "checkpoints/step_00000002")
    assert re.search(r"model +checkpoints/step_00000002\n", outcome.out)


def test_an_at_sign_in_a_folders_name_is_no_step(n, trained, data_root, tmp_path):
    shutil.copytree(data_root / "runs", tmp_path / "me@work" / "runs")
    for name in ("me@work/runs/first", "me@work/runs/first@1", "me@work/runs/first/checkpoints/step_00000001"):
        outcome = n("eval", tmp_path / name)
        assert outcome.code == 0, outcome.err


def test_a_checkpoint_that_was_copied_out_of_its_run_is_a_model_of_its_own(n, trained, data_root, prepared, tmp_path):
    copy = tmp_path / "runs" / "x" / "checkpoints" / "step_00000002"
    shutil.copytree(data_root / "runs" / trained / "checkpoints" / "step_00000002", copy)
    outcome = n("eval", copy, "--data", prepared, "--seq-len", "16")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", ["missing/folder", "text/"])
def test_a_path_that_holds_no_model_is_refused(n, trained, tmp_path, name):
    outcome = n("eval", tmp_path / name)
    assert outcome.code == 3
    assert "expected a run's folder or a complete tensor folder" in outcome.err


# ---- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "the", "--max-tokens", "3"]])
def test_kernels_are_the_callers_to_choose(n, trained, command):
    name, *options = command
    outcome = n(name, trained, *options, "--kernels", "reference")
    assert outcome.code == 0, outcome.err
    outcome = n(name, trained, *options, "--kernels", "native")  # which the CPU has not
    assert outcome.code == 5
    assert "--kernels reference" in outcome.err
    assert n(name, trained, *options, "--kernels", "fast").code == 2


# ---- import --------------------------------------------------------------------------------------------------------


def test_the_base_that_import_prints_works_from_any_folder(n, trained, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert n("export", trained, "--output", "hf").code == 0
    outcome = n("import", "hf", "--output", "my imported", "--tokenizer", "byte")
    assert outcome.code == 0, outcome.err
    base = re.search(r"begins with: (base = .*)", outcome.out)[1]
    (tmp_path / "configs").mkdir()
    body = config_file().read_text()
    rest = body[body.index("[train]") :]
    config = config_file(text=f"{base}\n\n{rest}", name="configs/mine.toml")
    outcome = n("train", config, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "kv_lora_rank = 16" in outcome.out


def test_import_keeps_what_export_said_of_tokenizer_and_context(n, trained, tmp_path):
    for name, source, *options in (("hf", trained), ("again", tmp_path / "model", "--max-position-embeddings", "48")):
        assert n("export", source, "--output", tmp_path / name, *options).code == 0
        outcome = n("import", tmp_path / name, "--output", tmp_path / ("model" if name == "hf" else "last"))
        assert outcome.code == 0, outcome.err
        assert re.search(r"tokenizer +byte\n", outcome.out)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 48
    assert n("export", tmp_path / "last", "--output", tmp_path / "third").code == 0
    configs = [(tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("again", "third")]
    assert configs[0] == configs[1]
    assert n("generate", tmp_path / "last", "--prompt", "the", "--max-tokens", "3").code == 0
    outcome = n("eval", tmp_path / "last")
    assert outcome.code == 2
    assert "add --seq-len, of at most 48 tokens, its context" in outcome.err

    other = tmp_path / "other.tiktoken"
    other.write_text("".join(f"{base64.b64encode(bytes([255 - rank])).decode()} {rank}\n" for rank in range(256)))
    outcome = n("import", tmp_path / "hf", "--output", tmp_path / "wrong", "--tokenizer", other)
    assert outcome.code == 2
    assert "its ids mean other text" in outcome.err
    assert not (tmp_path / "wrong").exists()


def test_a_tokenizer_that_is_a_file_is_asked_for_where_it_may_be_elsewhere(n, trained, tmp_path):
    file = tmp_path / "mine.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([rank])).decode()} {rank}\n" for rank in range(256)))
    assert n("export", trained, "--output", tmp_path / "bare").code == 0
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    assert n("import", tmp_path / "bare", "--output", tmp_path / "model", "--tokenizer", file).code == 0
    assert n("export", tmp_path / "model", "--output", tmp_path / "hf").code == 0
    exported = (tmp_path / "hf" / "tokenizer_config.json").read_text()
    assert json.loads(exported)["nmoe_tokenizer"]["name"] == "mine.tiktoken"
    assert str(tmp_path) not in exported
    outcome = n("import", tmp_path / "hf", "--output", tmp_path / "again")
    assert outcome.code == 2
    assert "mine.tiktoken" in outcome.err
    assert "add --tokenizer with that file's path" in outcome.err
    file.rename(tmp_path / "moved.tiktoken")
    outcome = n("import", tmp_path / "hf", "--output", tmp_path / "again", "--tokenizer", tmp_path / "moved.tiktoken")
    assert outcome.code == 0, outcome.err
    assert n("generate", tmp_path / "again", "--prompt", "the", "--max-tokens", "2").code == 0


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"nmoe_tokenizer": 3}', '{"nmoe_tokenizer": {"name": {}, "fingerprint": 1}}']
)
def test_import_of_anothers_folder_knows_no_tokenizer(n, trained, tmp_path, text):
    assert n("export", trained, "--output", tmp_path / "hf").code == 0
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.unlink()
    if text is not None:
        config.write_text(text)
    outcome = n("import", tmp_path / "hf", "--output", tmp_path / "model")
    assert outcome.code == 0, outcome.err
    assert re.search(r"tokenizer +not known\n", outcome.out)
    outcome = n("generate", tmp_path / "model", "--prompt", "the")
    assert outcome.code == 2
    assert "names no tokenizer" in outcome.err


@pytest.mark.parametrize("length", ["0", "-1"])
def test_a_context_of_no_tokens_is_refused(n, trained, tmp_path, length):
    outcome = n("export", trained, "--output", tmp_path / "hf", "--max-position-embeddings", length)
    assert outcome.code == 2
    assert f"expected 1 or more, found {length}" in outcome.err


# ---- profile -------------------------------------------------------------------------------------------------------


def test_a_profile_of_the_first_step_after_a_resume_is_written(train, trained, data_root):
    trace = data_root / "runs" / trained / "profile" / "trace.json"
    outcome = train("--run-id", trained, "--set", "train.steps=3", "--profile", "1:2")
    assert outcome.code == 0, outcome.err
    assert not trace.exists()  # those steps were made before
    outcome = train("--run-id", trained, "--set", "train.steps=4", "--profile", "4:4")
    assert outcome.code == 0, outcome.err
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"batch", "forward", "backward", "update"} <= names


# ---- data at the start ---------------------------------------------------------------------------------------------


@pytest.fixture
def flipped(prepared):
    """A shard with one token changed: its size and its header are whole."""
    file = prepared / "train" / "shard_00000.npy"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    return file


def test_a_flipped_token_is_refused_by_name_before_a_run_is_made(train, flipped, data_root):
    outcome = train()
    assert outcome.code == 3
    assert flipped.name in outcome.err
    assert not (data_root / "runs").exists()


def test_a_large_set_is_opened_by_sizes_and_that_is_said_with_the_command_that_checks(
    n, train, flipped, prepared, monkeypatch
):
    monkeypatch.setattr(run_data, "CHECKSUM_LIMIT", 100)
    outcome = train()
    assert outcome.code == 0, outcome.err
    told = re.search(
        rf"{re.escape(str(prepared / 'train'))} is large .*; n (data verify --\S+ \S+) checks", outcome.out
    )
    outcome = n(*told[1].split())
    assert outcome.code == 3
    assert flipped.name in outcome.err


def test_a_set_whose_bytes_were_checked_is_not_spoken_of(train):
    outcome = train()
    assert outcome.code == 0, outcome.err
    assert "data verify" not in outcome.out + outcome.err
