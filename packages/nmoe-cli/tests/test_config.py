"""What files, bases, flags and placeholders come to."""

from pathlib import Path

import pytest
from nmoe.cli.config import load_config, resolve
from nmoe.cli.errors import ConfigError
from nmoe.cli.toml_writer import dump_toml


def load(path, *sets, **environ):
    return load_config(path, sets, environ=environ)


def test_a_file_gives_its_values_and_the_schemas_defaults(config_file):
    config = load(config_file()).config
    assert (config.model.dim, config.train.steps, config.data.corpus) == (32, 10, "pydoc")
    assert (config.optim.beta1, config.eval.every, config.metrics.every) == (0.9, None, 1)


def test_a_base_is_merged_key_by_key_from_its_own_folder(config_file, tmp_path):
    config_file()
    (tmp_path / "deep").mkdir()
    middle = config_file(text='base = "../small.toml"\n[train]\nsteps = 20\n', name="deep/middle.toml")
    top = config_file(text='base = "deep/middle.toml"\n[optim]\nlr_dense = 5e-4\n', name="top.toml")
    loaded = load(top)
    assert (loaded.config.train.steps, loaded.config.train.batch_size) == (20, 8)
    assert (loaded.config.optim.lr_dense, loaded.config.optim.lr_expert) == (5e-4, 1e-3)
    assert loaded.sources == (tmp_path / "small.toml", middle, top)


def test_a_list_of_the_base_is_replaced_not_extended(config_file):
    config_file()
    top = config_file(text='base = "small.toml"\n[eval]\ntasks = []\n', name="top.toml")
    assert load(top).config.eval.tasks == ()


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("optim.lr_dense=1e-4", "optim.lr_dense", 1e-4),
        ("optim.lr_dense=1", "optim.lr_dense", 1.0),
        ("train.steps = 1_000", "train.steps", 1000),
        ("data.tokenizer=gpt2", "data.tokenizer", "gpt2"),
        ('data.tokenizer="gpt2"', "data.tokenizer", "gpt2"),
        ("data.path=data/mine=1", "data.path", Path("data/mine=1")),
        ("data.path=2026-01-31", "data.path", Path("2026-01-31")),
        ("model.qk_norm=false", "model.qk_norm", False),
        ("eval.tasks=['validation', 'validation']", "eval.tasks", ("validation", "validation")),
    ],
)
def test_set_takes_toml_values_and_bare_words(config_file, flag, key, value):
    section, name = key.split(".")
    found = getattr(getattr(load(config_file(), flag).config, section), name)
    assert found == value
    assert type(found) is type(value)


def test_set_reaches_sub_tables_and_the_last_one_wins(config_file):
    config = load(
        config_file(),
        "model.yarn.factor=4.0",
        "model.yarn={original_seq_len=128, factor=2.0}",
        "model.yarn.factor=8.0",
        "train.steps=1",
        "train.steps=2",
    ).config
    assert (config.model.yarn.factor, config.model.yarn.original_seq_len, config.train.steps) == (8.0, 128, 2)


def test_a_set_value_cannot_smuggle_in_another_key(config_file):
    config = load(config_file(), 'data.tokenizer=1\ntrain = "x"').config
    assert config.data.tokenizer == '1\ntrain = "x"'


@pytest.mark.parametrize(
    ("text", "environ", "path"),
    [
        ("${NMOE_ROOT:-data}/x", {}, "data/x"),
        ("${NMOE_ROOT:-data}/x", {"NMOE_ROOT": ""}, "data/x"),
        ("${NMOE_ROOT:-data}/x", {"NMOE_ROOT": "/big"}, "/big/x"),
        ("${NMOE_ROOT}/${NMOE_B:-y}", {"NMOE_ROOT": "r"}, "r/y"),
        ("${NMOE_ROOT:-a:-b}", {}, "a:-b"),
        ("$NMOE_ROOT/x", {"NMOE_ROOT": "r"}, "$NMOE_ROOT/x"),
    ],
)
def test_placeholders(config_file, text, environ, path):
    assert load(config_file(), f"data.path='{text}'", **environ).config.data.path == Path(path)


def test_a_base_may_be_named_by_a_placeholder(config_file):
    config_file()
    top = config_file(text='base = "${NMOE_BASE:-small}.toml"', name="top.toml")
    assert load(top).config.train.steps == 10


def test_an_overridden_placeholder_needs_no_variable(config_file):
    file = config_file(('corpus = "pydoc"', 'path = "${NMOE_MISSING}"'))
    assert load(file, "data.path=here").config.data.path == Path("here")
    with pytest.raises(ConfigError, match="NMOE_MISSING is not set"):
        load(file)


@pytest.mark.parametrize("name", ["nano", "mini", "moonlet", "moonlight"])
def test_the_resolved_text_reads_back_to_the_same_configuration(config_file, name):
    shipped = Path(__file__).parents[3] / "configs" / f"{name}.toml"
    flags = ("model.yarn={factor=4.0, original_seq_len=128}", "train.target_loss=1.5", 'data.val_path="a \\" b"')
    first = load(shipped, *flags)
    again = load(config_file(text=dump_toml(first.resolved)))
    assert again.config == first.config
    assert again.resolved == first.resolved == resolve(again.config)


def test_the_resolved_text_holds_defaults_and_leaves_out_what_is_unset(config_file):
    resolved = load(config_file()).resolved
    assert resolved["optim"]["beta1"] == 0.9
    assert "target_loss" not in resolved["train"]
    assert "base" not in resolved
