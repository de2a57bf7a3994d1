"""From a mixture's file to a trained model: plan, prep-mixture, train; and what is refused before the first step."""

import json
import shutil

import pytest
from nmoe.cli.errors import ExitCode

MIXTURE = """
max_epochs = 2
val_fraction = 0.1

[[source]]
name = "letters"
input = "{folder}/letters.jsonl"
weight = 0.75

[[source]]
name = "digits"
input = "{folder}/digits.jsonl"
weight = 0.25

[[stage]]
name = "pretrain"

[[stage]]
name = "anneal"
weights = {{ digits = 1 }}
"""
FLOWS = """
[dev]
pretrain = 1280
anneal = 640

[long]
pretrain = 1_280_000
anneal = 640
"""


@pytest.fixture
def mixture(tmp_path):
    for name, alphabet in (("letters", "abcdefghij"), ("digits", "0123456789")):
        texts = ("".join(alphabet[(n * n + i * n) % 10] for i in range(40 + n % 7)) + f" {n}" for n in range(60))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "flows.toml").write_text(FLOWS)
    path = tmp_path / "both.toml"
    path.write_text(MIXTURE.format(folder=tmp_path))
    return path


@pytest.fixture
def settings(mixture, tmp_path):
    def sets(*more, flow="dev"):
        keys = [f"data.mixture={mixture}", f"data.flow={flow}", f"data.flow_profiles={tmp_path / 'flows.toml'}", *more]
        return [part for key in keys for part in ("--set", key)]

    return sets


@pytest.fixture
def prep(n, mixture, tmp_path):
    def call(*options, flow="dev"):
        flows = ("--flow", flow, "--flow-profiles", tmp_path / "flows.toml")
        return n("data", "prep-mixture", "--mixture", mixture, *flows, "--workers", 1, *options)

    return call


def lines(outcome, first):
    return [line.split() for line in outcome.out.splitlines() if line.startswith(first)]


def prep_command(mixture, folder):
    flow = f"--flow dev --flow-profiles {folder / 'flows.toml'}"
    return f"data prep-mixture --mixture {mixture} {flow} --tokenizer byte"


def test_the_plan_comes_before_anything_is_prepared(n, config_file, settings, mixture, tmp_path):
    outcome = n("data", "plan", config_file(), *settings())
    assert outcome.code == ExitCode.OK, outcome.err
    assert lines(outcome, "pretrain") == [
        ["pretrain", "digits", "25.0000%", "20", "320"],
        ["pretrain", "letters", "75.0000%", "60", "960"],
    ]
    assert lines(outcome, "anneal") == [["anneal", "digits", "100.0000%", "40", "640"]]
    assert "! not prepared" in outcome.out
    assert f"n {prep_command(mixture, tmp_path)}" in outcome.out
    assert "80 samples, 1.28k tokens" in outcome.out


def test_training_on_what_is_not_prepared_says_how_to_prepare_it(n, config_file, settings, mixture, tmp_path):
    outcome = n("train", config_file(), *settings())
    assert outcome.code == ExitCode.DATA
    assert "letters" in outcome.err
    assert "digits" in outcome.err
    assert f"n {prep_command(mixture, tmp_path)}" in outcome.err


def test_sources_are_prepared_as_far_as_the_flow_needs_them_and_only_once(n, prep, config_file, settings, tmp_path):
    outcome = prep()
    assert outcome.code == ExitCode.OK, outcome.err
    folder = tmp_path / "root" / "mixtures" / "both-dev-byte"
    tokens = {
        name: json.loads((folder / name / "train" / "manifest.json").read_text())["n_tokens"]
        for name in ("letters", "digits")
    }
    assert 860 <= tokens["letters"] <= 1100, "960 of them, to a document"
    assert 860 <= tokens["digits"] <= 1100, "for both stages"
    assert f"--set data.mixture={tmp_path / 'both.toml'} --set data.flow=dev" in outcome.out
    assert f"--set data.flow_profiles={tmp_path / 'flows.toml'}" in outcome.out
    again = prep()
    assert again.code == ExitCode.OK
    assert again.out.count("prepared already") == 2
    plan = n("data", "plan", config_file(), *settings())
    assert "not prepared" not in plan.out


def test_a_stage_alone_prepares_its_own_sources(prep, tmp_path):
    assert prep("--stage", "anneal").code == ExitCode.OK
    assert [path.name for path in (tmp_path / "root" / "mixtures" / "both-dev-byte").iterdir()] == ["digits"]
    outcome = prep("--stage", "fine")
    assert outcome.code == ExitCode.USAGE
    assert "expected one of the mixture's (pretrain, anneal), found 'fine'" in outcome.err


def test_repeats_above_the_limit_are_warned_of(n, prep, config_file, settings):
    prep(flow="long")
    outcome = n("data", "plan", config_file(), *settings(flow="long"))
    (letters,) = lines(outcome, "letters")
    assert letters[4:6] == ["!", "repeats"], letters
    assert "more than 2" in outcome.out


def test_it_trains_through_both_stages_and_goes_on_after_a_stop(n, prep, config_file, settings, tmp_path):
    prep()
    path = config_file()
    run = ["train", path, *settings(), "--run-id"]
    whole = n(*run, "whole", "--set", "train.steps=15", "--set", "checkpoint.every=5")
    assert whole.code == ExitCode.OK, whole.err
    assert "val/loss" in whole.out, "validated on what is kept of each source"
    n(*run, "cut", "--set", "train.steps=7")
    resumed = n(*run, "cut", "--set", "train.steps=15")
    assert resumed.code == ExitCode.OK, resumed.err
    runs = tmp_path / "root" / "runs"
    last = [runs / name / "checkpoints" / "step_00000015" for name in ("whole", "cut")]
    files = [sorted(each.name for each in folder.iterdir()) for folder in last]
    assert files[0] == files[1]
    tensors = [name for name in files[0] if name.endswith(".safetensors")]
    assert tensors
    for name in tensors:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_a_longer_last_stage_may_go_on_and_another_weight_may_not(n, prep, config_file, settings, mixture, tmp_path):
    prep()
    run = ["train", config_file(), *settings(), "--run-id", "mine"]
    assert n(*run, "--set", "train.steps=4").code == ExitCode.OK
    flows = tmp_path / "flows.toml"
    flows.write_text(FLOWS.replace("anneal = 640", "anneal = 6400", 1))
    assert n(*run, "--set", "train.steps=5").code == ExitCode.OK
    mixture.write_text(mixture.read_text().replace("0.75", "0.5"))
    outcome = n(*run, "--set", "train.steps=6")
    assert outcome.code != ExitCode.OK
    assert "data" in outcome.err


def test_a_run_that_is_longer_than_the_plan_is_refused_before_its_first_step(n, prep, config_file, settings, tmp_path):
    prep()
    longer = settings("train.steps=16")
    for command in (("train",), ("data", "plan")):
        outcome = n(*command, config_file(), *longer)
        assert outcome.code == ExitCode.USAGE
        assert "expected 128 samples of 16 tokens, as the run's steps take, found 120" in outcome.err
    assert not (tmp_path / "root" / "runs").exists()
    outcome = n("train", config_file(), *settings("data.stage=anneal", "train.steps=6"))
    assert outcome.code == ExitCode.USAGE
    assert "'anneal': expected 48 samples of 16 tokens, as the run's steps take, found 40" in outcome.err


def test_documents_may_be_kept_apart(n, prep, config_file, settings):
    prep()
    outcome = n("train", config_file(), *settings("data.document_masking=true", "data.loss_mask_eos=true"))
    assert outcome.code == ExitCode.OK, outcome.err


def damage(prepared, how, val):
    train = prepared / "letters" / "train"
    match how:
        case "missing shard":
            (train / "shard_00000.npy").unlink()
        case "altered shard":
            content = bytearray((train / "shard_00000.npy").read_bytes())
            content[-5] ^= 1
            (train / "shard_00000.npy").write_bytes(content)
        case "overlap":
            shutil.rmtree(val)
            shutil.copytree(train, val)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing shard", "letters/train/shard_00000.npy"),
        ("altered shard", "letters/train/shard_00000.npy"),
        ("overlap", "digits/val/shard_00000.npy: expected text that is not trained on"),
    ],
)
def test_what_is_wrong_with_a_source_is_told_before_the_first_step(
    n, prep, config_file, settings, tmp_path, how, words
):
    prep()
    prepared = tmp_path / "root" / "mixtures" / "both-dev-byte"
    damage(prepared, how, prepared / "digits" / "val")
    outcome = n("train", config_file(), *settings())
    assert outcome.code == ExitCode.DATA
    assert words in outcome.err
    assert not (tmp_path / "root" / "runs").exists()


def test_validation_that_repeats_training_documents_is_refused(n, prep, config_file, mixture, tmp_path):
    """The same documents in shards that are cut elsewhere."""
    other = tmp_path / "other"
    n("data", "prep", tmp_path / "letters.jsonl", "--output", other, "--val-fraction", "0", "--shard-tokens", "500")
    mine = tmp_path / "mine"
    n("data", "prep", tmp_path / "letters.jsonl", "--output", mine)
    sets = [f"data.path={mine}", f"data.val_path={other / 'train'}"]
    outcome = n("train", config_file(), *[part for key in sets for part in ("--set", key)])
    assert outcome.code == ExitCode.DATA
    assert "54 documents that stand in" in outcome.err
    assert "--dedupe" in outcome.err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("weight = 0.25", "weight = 0", "source[2].weight: Input should be greater than 0"),
        ("weight = 0.25", "wait = 1", "source[2].wait: unknown key"),
        ("{{ digits = 1 }}", "{{ digit = 1 }}", "stage 'anneal' weighs 'digit'"),
        ('"anneal"', '"fine"', "found none for 'fine'"),
    ],
)
def test_mistakes_in_the_files_are_named(n, config_file, settings, mixture, tmp_path, old, new, words):
    mixture.write_text(MIXTURE.replace(old, new).format(folder=tmp_path))
    for command in (("train",), ("data", "plan")):
        outcome = n(*command, config_file(), *settings())
        assert outcome.code == ExitCode.USAGE
        assert words in outcome.err


def test_keys_that_do_not_go_together(n, config_file, settings):
    outcome = n("data", "plan", config_file(), "--set", "data.flow=dev", "--set", "data.stage=anneal")
    assert outcome.code == ExitCode.USAGE
    assert "flow is of a mixture" in outcome.err
    assert "stage is of a mixture" in outcome.err


def test_a_mixture_wins_over_a_path_so_that_any_configuration_takes_one(n, config_file, settings):
    outcome = n("data", "plan", config_file(), *settings("data.path=somewhere"))
    assert outcome.code == ExitCode.OK
    assert "letters" in outcome.out


def test_one_source_alone_has_a_plan_too(n, config_file):
    outcome = n("data", "plan", config_file())
    assert outcome.code == ExitCode.OK
    assert lines(outcome, "pretrain") == [["pretrain", "data", "100.0000%", "80", "1.28k"]]
