"""What `--dry-run` tells is what the packages below count."""

import io
import tomllib
from pathlib import Path

import pytest
import torch
from nmoe.cli.config import load_config
from nmoe.cli.console import make_console
from nmoe.cli.dry_run import device_memory, print_dry_run
from nmoe.cli.errors import ExitCode
from nmoe.cli.units import format_bytes
from nmoe.train.memory import predict_memory
from nmoe.train.recompute import enough_layers, recompute_share, with_recomputed

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
    _, _, table = dry_run(CONFIGS / "moonlet.toml", "model.n_layers=100")
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


def row(table, label):
    (line,) = [line for line in table.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).strip()


def test_nothing_is_said_of_recomputation_where_there_is_none(n, config_file):
    outcome = n("train", config_file(), "--dry-run")
    assert outcome.code == ExitCode.OK
    assert "  recomputed" not in outcome.out
    assert "remedy" not in outcome.out


def test_recomputed_layers_tell_what_they_save_and_cost(n, config_file):
    path = config_file(("n_layers = 2", "n_layers = 6"))
    plain = predict_memory(load_config(path, (), environ={}).config)
    outcome = n("train", path, "--dry-run", "--set", "train.recompute_layers=[0,4,1,2]")
    assert outcome.code == ExitCode.OK
    loaded, _, table = dry_run(path, "train.recompute_layers=[0,4,1,2]")
    assert table in outcome.out
    need = predict_memory(loaded.config)
    words = row(table, "recomputed")
    assert words.startswith(f"layers 0 to 2, 4: {format_bytes(plain.total - need.total)} less, ")
    assert words.endswith(f"{recompute_share(loaded.config):.1%} more FLOPs a step")
    assert format_bytes(need.total) == row(table, "in all")
    compute = [line for line in table.splitlines() if line.startswith(("compute", "step"))]
    _, _, without = dry_run(path)
    assert compute == [line for line in without.splitlines() if line.startswith(("compute", "step"))], "not the model's"
    _, _, table = dry_run(path, "train.recompute_layers=[3]")
    assert row(table, "recomputed").startswith("layer 3: ")


@pytest.mark.parametrize(
    ("kernels", "n_ranks", "a100", "b200"),
    [("native", 1, False, True), ("native", 2, False, False), ("reference", 1, True, True)],
)
def test_only_devices_that_the_kernels_are_for_are_listed(monkeypatch, kernels, n_ranks, a100, b200):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = [name for name, _ in device_memory("cuda", kernels, n_ranks)]
    assert "NVIDIA H200" in names
    assert ("NVIDIA A100-SXM4-80GB" in names) == a100
    assert ("NVIDIA B200" in names) == b200


def test_what_does_not_fit_comes_with_the_layers_that_would_make_it_fit(n, monkeypatch, config_file):
    path = config_file(("n_layers = 2", "n_layers = 6"))
    config = load_config(path, (), environ={}).config
    one, every = (predict_memory(with_recomputed(config, layers)).total for layers in ([1], range(6)))

    def remedy(memory):
        monkeypatch.setattr("nmoe.cli.dry_run.device_memory", lambda *how: [("a device", memory)])
        outcome = n("train", path, "--dry-run")
        assert outcome.code == ExitCode.OK
        return row(outcome.out.partition("== ")[2], "remedy")

    (layer,) = enough_layers(config, one)
    cost = f"{recompute_share(with_recomputed(config, [layer])):.1%} more FLOPs a step"
    assert remedy(one) == f"train.recompute_layers = [{layer}]: {format_bytes(one)} in all, {cost}"
    cost = f"{recompute_share(with_recomputed(config, range(6))):.1%} more FLOPs a step"
    assert remedy(every) == f'train.recompute_layers = "all": {format_bytes(every)} in all, {cost}'
    assert remedy(every - 1) == f'train.recompute_layers = "all" is not enough: {format_bytes(every)} in all'


def test_a_remedy_fits_when_it_is_taken():
    _, _, table = dry_run(CONFIGS / "moonlet.toml", "train.micro_batch_size=8")
    lines = table.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("NVIDIA H200")]
    assert "too small by" in lines[at]
    key, _, rest = lines[at + 1].strip().removeprefix("remedy").strip().partition(" = ")
    layers = rest.partition(":")[0]
    _, _, taken = dry_run(CONFIGS / "moonlet.toml", "train.micro_batch_size=8", f"{key}={layers}")
    assert "to spare" in row(taken, "NVIDIA H200")
    assert row(taken, "in all") == rest.partition(": ")[2].partition(" in all")[0]
    assert row(taken, "recomputed").endswith(rest.rpartition(", ")[2])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[2]", "train.recompute_layers: expected layers of the 2 (model.n_layers + model.mtp_depth) that there are"),
        ("[0,0]", "found 0 more than once: leave out what is too much"),
        ("some", """expected "all" or a list of layers such as [0, 1, 2], counted from 0, found 'some'"""),
        ("[-1]", "found [-1]"),
    ],
)
def test_layers_that_there_are_not_are_a_mistake_in_the_configuration(n, config_file, value, words):
    outcome = n("train", config_file(), "--dry-run", "--set", f"train.recompute_layers={value}")
    assert outcome.code == ExitCode.USAGE
    assert "error: 1 mistake in the configuration" in outcome.err
    assert words in outcome.err
    assert f"--set train.recompute_layers={value}" in outcome.err
