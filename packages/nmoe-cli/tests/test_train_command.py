"""`n train` and what follows it, as a user would type it, on a model of some thousand parameters."""

import base64
import re
import shutil

import pytest
import torch
from nmoe.cli import composition
from nmoe.train.experiments import Experiments

FAST = ["--set", "train.steps=4", "--set", "runtime.threads=1"]


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """What a model writes after its training would take longer than its training."""
    monkeypatch.setattr(composition, "SAMPLE_TOKENS", 8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two small documents of text, enough for a few samples each."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps over the lazy dog. " * 40)
    return folder


@pytest.fixture
def small(config_file):
    return config_file()


@pytest.fixture
def prepared(n, corpus, tmp_path):
    output = tmp_path / "tokens"
    assert n("data", "prep", str(corpus), "--output", str(output)).code == 0
    return output


@pytest.fixture
def trained(n, small, prepared):
    """A finished run's name."""
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--run-id", "first")
    assert outcome.code == 0, outcome.err
    return "first"


def test_a_run_ends_with_curve_sample_and_summary(n, small, prepared, data_root):
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST)
    assert outcome.code == 0, outcome.err
    for part in ("training loss by step", "Sample (", "val/bpb", "gzip -9", "Next:", "n generate"):
        assert part in outcome.out
    assert "n data prep" not in outcome.out  # these are the user's own data
    (run,) = (data_root / "runs").iterdir()
    assert re.search(rf"checkpoint +{re.escape(str(run))}/checkpoints/step_00000004", outcome.out)
    assert {"config.toml", "env.json", "metrics", "checkpoints"} <= {path.name for path in run.iterdir()}
    with Experiments(data_root / "experiments.db") as experiments:
        row = experiments.get(run.name)
    assert (row.status, row.step, row.steps) == ("finished", 4, 4)
    assert row.val_bpb is not None


def test_every_run_is_new_unless_it_is_named(n, small, prepared, data_root):
    for _ in range(2):
        assert n("train", small, "--set", f"data.path={prepared}", *FAST).code == 0
    assert len(list((data_root / "runs").iterdir())) == 2


def test_a_named_run_goes_on_where_it_ended_and_says_what_changed(n, small, prepared, trained):
    more = ["--set", f"data.path={prepared}", "--set", "runtime.threads=1", "--set", "train.steps=6"]
    outcome = n("train", small, *more, "--run-id", trained)
    assert outcome.code == 0, outcome.err
    assert "resumes after step 4" in outcome.out
    assert "train.steps: 4 before, 6 now" in outcome.out


def test_a_finished_run_is_not_repeated(n, small, prepared, trained):
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--run-id", trained)
    assert outcome.code == 2
    assert "train.steps" in outcome.err


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(n, small, prepared, trained, data_root, options):
    """As when a disk is not mounted: nothing is lost by it, and nothing is written over."""
    folder = data_root / "runs" / trained / "checkpoints"
    folder.rename(data_root / "elsewhere")
    common = ["train", small, "--set", f"data.path={prepared}", *FAST, "--set", "train.steps=6", "--run-id", trained]
    outcome = n(*common, *options)
    assert outcome.code == 3
    assert str(folder) in outcome.err
    assert "expected a checkpoint of a run that has made 4 steps, found none" in outcome.err
    with Experiments(data_root / "experiments.db") as experiments:
        assert (experiments.get(trained).status, experiments.get(trained).step) == ("finished", 4)
    shutil.rmtree(folder, ignore_errors=True)
    (data_root / "elsewhere").rename(folder)
    outcome = n(*common, *options)
    assert outcome.code == 0, outcome.err
    assert "step_00000006" in outcome.out


def test_a_damaged_database_is_told_and_can_be_moved_away(n, small, prepared, trained, data_root):
    database = data_root / "experiments.db"
    database.write_bytes(b"junk, as of another program" * 100)
    for command in (["runs"], ["train", small, "--set", f"data.path={prepared}", *FAST]):
        outcome = n(*command)
        assert outcome.code == 3
        assert f"{database}: expected an SQLite database, found damage" in outcome.err
    for path in data_root.glob("experiments.db*"):
        path.unlink()
    more = ["--set", "train.steps=6", "--run-id", trained]
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, *more)
    assert outcome.code == 0, outcome.err


def test_without_a_gpu_no_run_is_made(n, small, prepared, data_root):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--set", "runtime.device=cuda")
    assert outcome.code == 5
    assert "expected a visible GPU" in outcome.err
    assert not (data_root / "runs").exists()


def test_a_folder_that_is_not_prepared_is_told_from_one_of_prepared_ones(n, small, corpus, prepared):
    outcome = n("train", small, "--set", f"data.path={prepared.parent}", *FAST)
    assert outcome.code == 3
    assert f"Give one of them: {prepared.name}." in outcome.err
    outcome = n("train", small, "--set", f"data.path={corpus}", *FAST)
    assert outcome.code == 3
    assert "no manifest.json. Give a folder that n data prep wrote" in outcome.err


def test_a_run_that_validates_nothing_says_so(n, small, prepared):
    outcome = n("train", small, "--set", f"data.path={prepared / 'train'}", *FAST)
    assert outcome.code == 0, outcome.err
    assert "Nothing is validated" in outcome.out


def test_no_resume_refuses_an_existing_run_and_resume_a_missing_one(n, small, prepared, trained):
    common = ["train", small, "--set", f"data.path={prepared}", *FAST, "--run-id"]
    outcome = n(*common, trained, "--no-resume")
    assert outcome.code == 2
    assert "exists" in outcome.err
    outcome = n(*common, "fist", "--resume")
    assert outcome.code != 0
    assert "first" in outcome.err  # the nearest name


def test_a_changed_identity_key_is_refused_with_old_and_new(n, small, prepared, trained):
    outcome = n(
        "train", small, "--set", f"data.path={prepared}", "--set", "train.steps=9",
        "--set", "runtime.threads=1", "--set", "optim.lr_dense=2e-3", "--run-id", trained,
    )  # fmt: skip
    assert outcome.code == 2
    assert "optim.lr_dense" in outcome.err
    assert "0.001" in outcome.err
    assert "0.002" in outcome.err


def test_other_data_are_another_identity(n, small, corpus, prepared, trained, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("something else entirely. " * 60)
    other = tmp_path / "other"
    assert n("data", "prep", str(corpus), str(tmp_path / "more"), "--output", str(other)).code == 0
    outcome = n("train", small, "--set", f"data.path={other}", "--set", "train.steps=9", "--run-id", trained)
    assert outcome.code == 2
    assert "data" in outcome.err


def test_the_same_data_elsewhere_are_the_same_identity(n, small, prepared, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(prepared, moved)
    outcome = n(
        "train", small, "--set", f"data.path={moved}", "--set", "train.steps=5",
        "--set", "runtime.threads=1", "--run-id", trained,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err


def test_from_starts_a_new_run_and_records_the_parent(n, small, prepared, trained, data_root):
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--from", f"{trained}@4", "--run-id", "child")
    assert outcome.code == 0, outcome.err
    with Experiments(data_root / "experiments.db") as experiments:
        row = experiments.get("child")
    assert (row.parent_run, row.parent_step) == (trained, 4)


def test_from_another_shape_is_refused_by_tensor_name(n, small, prepared, trained):
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--from", trained, "--set", "model.dim=48")
    assert outcome.code == 3
    assert "embed.weight" in outcome.err


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name(n, small, prepared, trained, data_root, damage):
    file = next((data_root / "runs" / trained / "checkpoints" / "step_00000004").glob("*.safetensors"))
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.unlink()
    for command in (
        ["train", small, "--set", f"data.path={prepared}", "--set", "train.steps=9", "--run-id", trained],
        ["generate", trained, "--prompt", "x"],
        ["eval", trained],
    ):
        outcome = n(*command)
        assert outcome.code == 3, command
        assert file.name in outcome.err


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_refused_by_name(n, small, prepared, damage):
    file = prepared / "train" / "shard_00000.npy"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1  # in a token
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST)
    assert outcome.code == 3
    assert file.name in outcome.err


def test_generation_is_reproducible_and_continues_the_prompt(n, trained):
    def text(*options):
        outcome = n("generate", trained, "--prompt", "the quick", "--max-tokens", "20", *options)
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert text("--seed", "1").startswith("the quick")
    assert text("--seed", "1") == text("--seed", "1")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-p", "0"], ["--max-tokens", "0"]])
def test_impossible_sampling_is_refused(n, trained, option):
    assert n("generate", trained, "--prompt", "x", *option).code == 2


def test_eval_gives_the_figures_of_training(n, trained, data_root):
    with Experiments(data_root / "experiments.db") as experiments:
        bpb = experiments.get(trained).val_bpb
    outcome = n("eval", trained)
    assert outcome.code == 0, outcome.err
    assert f"{bpb:.4f} bits a byte" in outcome.out


def test_a_mistyped_run_gets_the_nearest_name(n, trained):
    outcome = n("eval", "frist")
    assert outcome.code == 2
    assert trained in outcome.err


def test_a_missing_step_lists_those_there_are(n, trained):
    outcome = n("eval", f"{trained}@3")
    assert outcome.code == 3
    assert "found steps 4" in outcome.err


def test_export_and_import_give_the_same_model_back(n, small, prepared, trained, tmp_path):
    exported, imported = tmp_path / "hf", tmp_path / "imported"
    outcome = n("export", trained, "--output", str(exported))
    assert outcome.code == 0, outcome.err
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in exported.iterdir()}
    outcome = n("import", str(exported), "--output", str(imported))
    assert outcome.code == 0, outcome.err
    texts = [
        n("generate", name, "--prompt", "the", "--temperature", "0", "--max-tokens", "12").out
        for name in (trained, str(imported))
    ]
    assert texts[0] == texts[1]
    outcome = n("eval", str(imported), "--data", str(prepared), "--seq-len", "16")
    assert outcome.code == 0, outcome.err
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--from", str(imported))
    assert outcome.code == 0, outcome.err


def test_export_refuses_what_the_format_cannot_say(n, small, prepared, tmp_path):
    local = ["model.attn_local=swa", "model.attn_local_window=8", "model.attn_global_every=2"]
    sets = [part for value in local for part in ("--set", value)]
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, *sets, "--run-id", "local")
    assert outcome.code == 0, outcome.err
    outcome = n("export", "local", "--output", str(tmp_path / "hf"))
    assert outcome.code == 2
    assert "attn_local" in outcome.err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("option", ["3", "0:2", "4:2", "a:b"])
def test_a_malformed_profile_is_refused_before_anything_is_made(n, small, data_root, option):
    outcome = n("train", small, "--profile", option)
    assert outcome.code == 2
    assert "START:STOP" in outcome.err
    assert not (data_root / "runs").exists()


def test_data_of_another_tokenizer_are_refused(n, small, prepared):
    outcome = n("train", small, "--set", f"data.path={prepared}", *FAST, "--set", "model.vocab_size=100")
    assert outcome.code == 3
    assert "257" in outcome.err


def test_a_finished_run_that_saved_nothing_is_not_repeated_either(n, small, prepared):
    common = ["train", small, "--set", f"data.path={prepared}", *FAST, "--set", "checkpoint.enabled=false"]
    assert n(*common, "--run-id", "timing").code == 0
    outcome = n(*common, "--run-id", "timing")
    assert outcome.code == 2
    assert "has its 4 steps" in outcome.err


def test_a_refused_resume_leaves_the_record_alone(n, small, prepared, trained, data_root):
    with Experiments(data_root / "experiments.db") as experiments:
        before = experiments.get(trained)
    config = (data_root / "runs" / trained / "config.toml").read_text()
    outcome = n(
        "train", small, "--set", f"data.path={prepared}", "--set", "train.steps=9", "--set", "optim.lr_dense=0.5",
        "--run-id", trained,
    )  # fmt: skip
    assert outcome.code == 2
    assert "continue it with" not in outcome.err
    with Experiments(data_root / "experiments.db") as experiments:
        assert experiments.get(trained) == before
    assert (data_root / "runs" / trained / "config.toml").read_text() == config


def test_a_child_killed_before_its_first_checkpoint_still_starts_from_its_parent(
    n, small, prepared, trained, data_root
):
    slow = ["--set", "optim.lr_dense=1e-9", "--set", "optim.lr_router=1e-9", "--set", "optim.lr_expert=1e-9"]
    common = ["train", small, "--set", f"data.path={prepared}", *FAST, *slow, "--run-id", "child"]
    assert n(*common, "--from", trained).code == 0
    first = val_loss(data_root, "child")
    shutil.rmtree(data_root / "runs" / "child" / "checkpoints")  # as a kill before the first save leaves it
    with Experiments(data_root / "experiments.db") as experiments:
        experiments.finish("child", "failed")
    outcome = n(*common)
    assert outcome.code == 0, outcome.err
    assert val_loss(data_root, "child") == pytest.approx(first, rel=1e-4)


def val_loss(data_root, run_id):
    with Experiments(data_root / "experiments.db") as experiments:
        return experiments.get(run_id).val_loss


def test_from_tells_what_of_the_model_differs_and_makes_nothing_when_it_refuses(n, small, prepared, trained, data_root):
    common = ["train", small, "--set", f"data.path={prepared}", *FAST, "--from", trained, "--run-id", "child"]
    outcome = n(*common, "--set", "model.n_layers=1")
    assert outcome.code == 3
    assert "layers.1." in outcome.err
    assert not (data_root / "runs" / "child").exists()
    outcome = n(*common, "--set", "model.rope_theta=500.0")
    assert outcome.code == 0, outcome.err
    assert "model.rope_theta: 10000.0 in first, 500.0 here" in outcome.out


def test_another_tokenizer_than_the_models_is_refused(n, small, corpus, tmp_path, trained):
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in reversed(range(256)))
    (tmp_path / "other.tiktoken").write_text(ranks)
    outcome = n("generate", trained, "--prompt", "x", "--tokenizer", str(tmp_path / "other.tiktoken"))
    assert outcome.code == 2
    assert "byte" in outcome.err


def test_runs_follow_their_progress(n, trained, data_root):
    with Experiments(data_root / "experiments.db") as experiments:
        row = experiments.get(trained)
    assert (row.step, row.status) == (4, "finished")
    assert row.train_loss is not None
    assert trained in n("runs").out
