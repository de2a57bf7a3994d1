"""The `[model]` section: which shapes are whole, which layers are local or dense, and that it needs no torch."""

import subprocess
import sys

import pytest
from nmoe.model.schema import ModelConfig, YarnConfig
from pydantic import ValidationError

MLA = {"attn": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
SDPA = {"attn": "sdpa", "head_dim": 8}
MOE = {"inter_dim": 16, "moe_inter_dim": 8, "n_routed_experts": 8, "n_activated_experts": 2}
SWA = {"attn_local": "swa", "attn_global_every": 6, "attn_local_window": 64}
SHAPE = {"vocab_size": 32, "dim": 16, "n_layers": 4, "n_heads": 2}
VALID = {**SHAPE, **MLA, **MOE}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({**VALID, "kv_lora_rank": None}, "attn = 'mla' needs kv_lora_rank"),
        ({**VALID, "v_head_dim": None}, "attn = 'mla' needs v_head_dim"),
        ({**VALID, "head_dim": 8}, "attn = 'mla' does not use head_dim"),
        ({**VALID, "qk_norm": True}, "qk_norm belongs to attn = 'sdpa'"),
        ({**VALID, "qk_rope_head_dim": 5}, "RoPE turns pairs: 5 is odd"),
        ({**SHAPE, **MOE, "attn": "sdpa"}, "attn = 'sdpa' needs head_dim"),
        ({**SHAPE, **MOE, **SDPA, "head_dim": 7}, "RoPE turns pairs: 7 is odd"),
        ({**SHAPE, **MOE, **SDPA, "q_lora_rank": 4}, "attn = 'sdpa' does not use q_lora_rank"),
        ({**SHAPE, **MOE, **SDPA, "v_head_dim": 4}, "attn = 'sdpa' does not use v_head_dim"),
        ({**VALID, "attn_local": "swa"}, "go together"),
        ({**VALID, "attn_global_every": 6, "attn_local_window": 8}, "go together"),
        ({**VALID, "n_dense_layers": 5}, "n_dense_layers = 5 exceeds n_layers = 4"),
        ({**VALID, "inter_dim": None}, "dense layers need inter_dim"),
        ({**VALID, "moe_inter_dim": None}, "MoE layers need moe_inter_dim"),
        ({**VALID, "n_routed_experts": None}, "MoE layers need n_routed_experts"),
        ({**VALID, "n_activated_experts": None}, "MoE layers need n_activated_experts"),
        ({**VALID, "n_expert_groups": 3}, "no multiple of n_expert_groups = 3"),
        ({**VALID, "n_expert_groups": 2, "n_limited_groups": 3}, "n_limited_groups = 3 exceeds n_expert_groups = 2"),
        ({**VALID, "n_expert_groups": 8, "n_limited_groups": 8}, "a group needs at least two"),
        ({**VALID, "n_activated_experts": 9}, "n_activated_experts = 9 exceeds the 8"),
        ({**VALID, "n_expert_groups": 4, "n_activated_experts": 3}, "n_activated_experts = 3 exceeds the 2"),
    ],
)
def test_refuses_what_does_not_belong_together(section: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(section)
    assert problem in str(caught.value)


def test_problems_are_told_together() -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({**VALID, "kv_lora_rank": None, "n_expert_groups": 3, "attn_local": "swa"})
    message = str(caught.value)
    assert all(part in message for part in ("needs kv_lora_rank", "n_expert_groups = 3", "go together"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("dim", -1),
        ("n_dense_layers", -1),
        ("norm_eps", 0.0),
        ("attn", "gqa"),
        ("attn_local", "nsa"),
        ("attn_local_window", 0),
        ("route_scale", 0.0),
        ("seq_balance_loss", -0.1),
        ("mtp_depth", -1),
        ("yarn", {"factor": 1.0, "original_seq_len": 64}),
        ("yarn", {"factor": 4.0}),
        ("n_hidden", 8),
    ],
)
def test_refuses_values_out_of_range_by_key(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({**VALID, key: value})
    assert caught.value.errors()[0]["loc"][0] == key


def test_is_frozen() -> None:
    config = ModelConfig(**VALID)
    with pytest.raises(ValidationError):
        config.dim = 17


def test_a_dense_model_needs_no_experts() -> None:
    config = ModelConfig(**SHAPE, **SDPA, inter_dim=16, n_dense_layers=4)
    assert not config.has_moe


def test_every_sixth_global_and_the_last_always() -> None:
    local = {n: [ModelConfig(**{**VALID, **SWA, "n_layers": n}).is_local(i) for i in range(n + 2)] for n in (4, 12, 14)}
    assert local[4] == [True, True, True, False, False, False]
    assert local[12] == ([True] * 5 + [False]) * 2 + [False, False]
    assert local[14] == ([True] * 5 + [False]) * 2 + [True, False] + [False, False], "13 is last; MTP's are global"


@pytest.mark.parametrize(("every", "pattern"), [(1, [False] * 5), (2, [True, False, True, False, False])])
def test_global_every(every: int, pattern: list[bool]) -> None:
    config = ModelConfig(**{**VALID, **SWA, "n_layers": 5, "attn_global_every": every})
    assert [config.is_local(i) for i in range(5)] == pattern


def test_without_swa_all_are_global() -> None:
    assert not any(ModelConfig(**VALID).is_local(i) for i in range(6))


def test_first_layers_are_dense_and_mtp_is_of_the_last_kind() -> None:
    mixed = ModelConfig(**{**VALID, "n_dense_layers": 2})
    assert [mixed.is_dense(i) for i in range(6)] == [True, True, False, False, False, False]
    dense = ModelConfig(**SHAPE, **SDPA, inter_dim=16, n_dense_layers=4, mtp_depth=1)
    assert [dense.is_dense(i) for i in range(5)] == [True] * 5


def test_every_field_decides_what_is_computed() -> None:
    assert all("identity" in field.metadata for field in ModelConfig.model_fields.values())


def test_rope_dim() -> None:
    assert ModelConfig(**VALID).rope_dim == 4
    assert ModelConfig(**SHAPE, **SDPA, **MOE).rope_dim == 8


def test_yarn_defaults_are_the_papers() -> None:
    yarn = YarnConfig(factor=40.0, original_seq_len=4096)
    assert (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


def test_schema_and_counts_import_no_torch() -> None:
    modules = "nmoe.model, nmoe.model.schema, nmoe.model.count, nmoe.model.errors"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    import nmoe.model

    assert all(getattr(nmoe.model, name) is not None for name in nmoe.model.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        nmoe.model.nonsense
