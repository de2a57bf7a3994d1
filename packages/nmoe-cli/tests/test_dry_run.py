"""What `--dry-run` tells is what the packages below count."""

import io
import tomllib
from pathlib import Path

import pytest
from nmoe.cli.config import load_config
from nmoe.cli.console import make_console
from nmoe.cli.dry_run import print_dry_run
from nmoe.cli.errors import ExitCode
from nmoe.cli.units import format_bytes
from nmoe.train.memory import predict_memory

CONFIGS = Path(__file__).parents[3] / "configs"


def dry_run(path, *sets):
    out = io.StringIO()
    loaded = load_config(path, sets, environ={})
    print_dry_run(make_console(out), loaded)
    resolved, _, table = out.getvalue().partition("== ")
    return loaded, tomllib.loads(resolved), table


def test_the_resolved_configuration_comes_first_and_is_toml(config_file):
    loaded, resolved, _ = dry_run(config_file(), "train.steps=77")
    assert resolved == loaded.resolved
    assert resolved["train"]["steps"] == 77


def test_moonlet_is_as_large_as_its_first_line_says():
    _, _, table = dry_run(CONFIGS / "moonlet.toml")
    assert "7.34B in all" in table
    assert "32,768 tokens" in table
    assert "983M tokens" in table


@pytest.mark.parametrize("name", ["nano", "moonlight"])
def test_a_ranks_memory_is_told_part_by_part(name):
    loaded, _, table = dry_run(CONFIGS / f"{name}.toml")
    need = predict_memory(loaded.config)
    for part in ("parameters", "gradients", "optimizer", "activations", "workspace"):
        assert f"  {part}" in table
        assert format_bytes(getattr(need, part)) in table
    assert format_bytes(need.total) in table
    assert f"of {loaded.config.runtime.world_size}" in table


def test_a_bases_file_is_named_with_the_one_that_inherits_it():
    _, _, table = dry_run(CONFIGS / "moonlight.toml")
    assert f"{CONFIGS / 'moonlight.toml'} < {CONFIGS / 'moonlet.toml'}" in table


def test_a_cpu_run_is_compared_with_this_machine(config_file):
    _, _, table = dry_run(config_file())
    assert "this machine" in table
    assert "to spare" in table


def test_what_does_not_fit_is_said_for_each_known_gpu():
    _, _, table = dry_run(CONFIGS / "moonlet.toml", "model.n_layers=200")
    gpus = [line for line in table.splitlines() if line.startswith("NVIDIA")]
    assert gpus
    assert all("too small by" in line for line in gpus)


def test_n_train_dry_run_writes_nothing(n, config_file, tmp_path):
    path = config_file()
    outcome = n("train", path, "--dry-run", "--set", "train.steps=3", "--set", "model.dim=64")
    assert outcome.code == ExitCode.OK
    assert "steps = 3\n" in outcome.out
    assert "dim = 64\n" in outcome.out
    assert "Dry run: nothing was written" in outcome.out
    assert list(tmp_path.iterdir()) == [path]


def test_n_train_tells_every_mistake_and_ends_with_2(n, config_file):
    path = config_file(("n_heads = 2", "n_head = 2"))
    outcome = n("train", path, "--dry-run", "--set", "train.step=3")
    assert outcome.code == ExitCode.USAGE
    assert outcome.out == ""
    assert outcome.err.splitlines() == [
        "error: 2 mistakes in the configuration",
        f"  {path}:5: model.n_head: unknown key; did you mean model.n_heads?",
        "  --set train.step=3: train.step: unknown key; did you mean train.steps?",
    ]
