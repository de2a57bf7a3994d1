"""The fingerprint changes with what is computed, and with nothing else."""

import pytest
from nmoe.cli.config import load_config
from nmoe.cli.fingerprint import Change, diff, fingerprint, identity_fields, operational_fields


def load(path, *sets):
    return load_config(path, sets, environ={}).config


@pytest.mark.parametrize(
    "flag",
    [
        "model.rope_theta=20000.0",
        "model.yarn={factor=4.0, original_seq_len=128}",
        "train.batch_size=16",
        "train.seq_len=32",
        "optim.lr_dense=2e-3",
        "optim.clip_grad_norm=2.0",
        "schedule.decay_tokens=5",
        "data.tokenizer=gpt2",
        "runtime.seed=1",
        "runtime.precision=bf16",
    ],
)
def test_what_is_computed_changes_it(config_file, flag):
    path = config_file()
    old, new = load(path), load(path, flag)
    assert fingerprint(old, "data") != fingerprint(new, "data")
    changes = diff(identity_fields(old), identity_fields(new))
    assert changes
    assert all(change.key.startswith(flag.partition("=")[0]) for change in changes)
    assert not diff(operational_fields(old), operational_fields(new))


@pytest.mark.parametrize(
    "flag",
    [
        "train.steps=99",
        "train.micro_batch_size=2",
        "train.target_loss=1.0",
        "checkpoint.every=5",
        "metrics.every=7",
        "eval.every=3",
        "data.path=elsewhere",
        "runtime.threads=2",
    ],
)
def test_how_and_where_it_runs_does_not(config_file, flag):
    path = config_file()
    old, new = load(path), load(path, flag)
    assert fingerprint(old, "data") == fingerprint(new, "data")
    (change,) = diff(operational_fields(old), operational_fields(new))
    assert change.key == flag.partition("=")[0]


def test_the_data_changes_it(config_file):
    config = load(config_file())
    assert fingerprint(config, "one") != fingerprint(config, "two")


def test_ways_of_writing_the_same_value_do_not(config_file):
    path = config_file()
    same = load(path, "optim.lr_dense=0.001", "optim.beta1=0.9", "model.aux_loss=0")
    assert fingerprint(load(path), "data") == fingerprint(same, "data")


def test_unset_keys_do_not_enter_it(config_file):
    fields = identity_fields(load(config_file()))
    assert None not in fields.values()
    assert "model.q_lora_rank" not in fields


def test_every_field_is_one_or_the_other(config_file):
    config = load(config_file(), "model.yarn={factor=4.0, original_seq_len=128}")
    identity, operational = identity_fields(config), operational_fields(config)
    assert not identity.keys() & operational.keys()
    assert {"model.yarn.factor", "model.dim", "runtime.device"} <= identity.keys()
    assert {"train.steps", "eval.tasks", "rdep.timeout_s", "optim.reduce_scatter_chunk_mb"} <= operational.keys()


def test_a_diff_gives_old_and_new_value_and_none_for_unset():
    old = {"a": 1, "b": 2.0, "gone": "x"}
    new = {"a": 1, "b": 3.0, "come": ["y"]}
    assert diff(old, new) == [Change("b", 2.0, 3.0), Change("come", None, ["y"]), Change("gone", "x", None)]
    assert diff(old, old) == []
