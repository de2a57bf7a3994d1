"""The files in configs/ do what their first lines say."""

from pathlib import Path

import pytest
from nmoe.cli.config import load_config
from nmoe.data.mixture import read_budgets, read_mixture
from nmoe.data.plan import make_plan

CONFIGS = Path(__file__).parents[3] / "configs"
MIXTURES = sorted((CONFIGS / "mixtures").glob("*.toml"))
FLOWS = CONFIGS / "flow_profiles.toml"
ALL = sorted(set(CONFIGS.rglob("*.toml")) - {*MIXTURES, FLOWS})


def load(name):
    return load_config(CONFIGS / f"{name}.toml", environ={}).config


def test_there_are_the_six():
    assert {path.stem for path in ALL} >= {"nano", "mini", "moonlet", "moonlight", "super", "super_dense"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_loads_says_its_command_and_schedules_its_own_length(path):
    config = load_config(path, environ={}).config
    head = path.read_text().split("\n\n")[0] + path.read_text().split("\n[")[0]
    assert head.startswith(f"# {path.stem}: ")
    assert "Needs " in head
    assert f"n train configs/{path.relative_to(CONFIGS).as_posix()}" in head
    schedule = config.schedule
    planned = schedule.warmup_steps * config.tokens_per_step + schedule.hold_tokens + schedule.decay_tokens
    assert planned == config.train.steps * config.tokens_per_step


@pytest.mark.parametrize("profile", ["dev", "ablation", "proxy", "production"])
@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_a_mixture_has_a_plan_in_every_flow(path, profile):
    mixture = read_mixture(path)
    plan = make_plan(mixture, dict.fromkeys(mixture.names), 1, budgets=read_budgets(FLOWS, profile, mixture))
    assert plan.n_samples == sum(stage.n_samples for stage in plan.stages)
    assert {total.source for total in plan.totals} == set(mixture.names)
    assert path.read_text().startswith(f"# {path.stem}: ")
    assert f"n data prep-mixture --mixture configs/mixtures/{path.name}" in path.read_text()


def test_nano_uses_every_part_of_the_model_on_a_cpu():
    config = load("nano")
    model = config.model
    assert config.runtime.device == "cpu"
    assert config.data.corpus == "pydoc"
    assert model.attn == "mla"
    assert {model.is_local(layer) for layer in range(model.n_layers)} == {True, False}
    assert model.has_moe
    assert model.n_shared_experts
    assert model.n_dense_layers
    assert model.mtp_depth


def test_moonlet_and_moonlight_are_moonlight_16b_a3b_but_for_vocabulary_and_depth():
    released = {
        "dim": 2048,
        "n_heads": 16,
        "norm_eps": 1e-5,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 50_000.0,
        "inter_dim": 11_264,
        "moe_inter_dim": 1408,
        "n_routed_experts": 64,
        "n_activated_experts": 6,
        "n_shared_experts": 2,
        "n_dense_layers": 1,
        "route_scale": 2.446,
        "vocab_size": 201_088,
    }
    for name, layers in (("moonlet", 12), ("moonlight", 27)):
        model = load(name).model
        assert {key: getattr(model, key) for key in released} == released
        assert model.n_layers == layers


def test_batches_and_gpus_are_as_the_first_lines_say():
    moonlet, moonlight = load("moonlet"), load("moonlight")
    assert (moonlet.train.batch_size, moonlet.train.seq_len, moonlet.runtime.world_size) == (8, 4096, 1)
    assert (moonlight.train.batch_size, moonlight.runtime.world_size) == (64, 8)
    assert moonlet.optim.lr_expert == moonlet.optim.lr_dense == moonlet.optim.lr_router == 3e-3


def test_super_and_its_dense_twin_differ_in_their_feed_forward_alone():
    moe, dense = (load(f"speedrun/{name}") for name in ("super", "super_dense"))
    differ = {key for key, value in moe.model if value != getattr(dense.model, key)}
    assert differ == {
        *("n_dense_layers", "inter_dim", "moe_inter_dim", "n_routed_experts", "n_activated_experts"),
        *("n_shared_experts", "seq_balance_loss"),
    }
    assert (moe.model.dim, moe.model.n_heads, moe.model.head_dim, moe.model.vocab_size) == (768, 12, 64, 50_304)
    assert (moe.model.n_routed_experts, moe.model.n_activated_experts, moe.model.moe_inter_dim) == (256, 7, 384)
    assert moe.tokens_per_step == dense.tokens_per_step == 65_536
