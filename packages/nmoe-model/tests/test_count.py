"""Shapes, parameter counts and FLOPs against the modules themselves and against sums done by hand."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.model.count import count_parameters, flops_per_token, parameter_shapes
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

SHAPE = {"vocab_size": 97, "dim": 24, "n_layers": 3, "n_heads": 2}
MLA = {"attn": "mla", "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
SDPA = {"attn": "sdpa", "head_dim": 14}
DENSE = {"inter_dim": 30, "n_dense_layers": 3}
MOE = {"inter_dim": 30, "moe_inter_dim": 7, "n_routed_experts": 6, "n_activated_experts": 2, "n_shared_experts": 2}
CONFIGS = {
    "mla": {**MLA, **MOE},
    "mla_q_lora": {**MLA, **MOE, "q_lora_rank": 9},
    "mla_dense": {**MLA, **DENSE},
    "mla_all_experts": {**MLA, **MOE, "n_dense_layers": 0, "inter_dim": None},
    "no_shared": {**MLA, **MOE, "n_shared_experts": 0},
    "swa": {**MLA, **MOE, "attn_local": "swa", "attn_global_every": 2, "attn_local_window": 4},
    "mtp_2": {**MLA, **MOE, "mtp_depth": 2},
    "mtp_2_dense": {**SDPA, **DENSE, "mtp_depth": 2},
    "sdpa": {**SDPA, **MOE},
    "sdpa_qk_norm": {**SDPA, **MOE, "qk_norm": True, "mtp_depth": 1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_the_models(name: str) -> None:
    """Names, order and shapes, on the meta device."""
    config = ModelConfig(**SHAPE, **CONFIGS[name])
    ops = select_ops("reference", "meta")
    model = Transformer.build(config, ops, LocalTransport(), device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert list(parameter_shapes(config).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_count_by_hand() -> None:
    """mla_q_lora with two MTP modules: the sums written out."""
    config = ModelConfig(**SHAPE, **CONFIGS["mla_q_lora"], mtp_depth=2)
    attention = (9 * 24) + 9 + (2 * 10 * 9) + (14 * 24) + 10 + (2 * 11 * 10) + (24 * 10)
    expert = 3 * 7 * 24
    dense = attention + 2 * 24 + 3 * 30 * 24
    router_and_shared = 6 * 24 + 2 * expert
    moe = attention + 2 * 24 + router_and_shared + 6 * expert
    active_moe = attention + 2 * 24 + router_and_shared + 2 * expert
    mtp = 2 * (3 * 24 + 24 * 48 + moe)
    embedding = 97 * 24
    found = count_parameters(config)
    assert found.embedding == embedding
    assert found.mtp == mtp
    assert found.experts == (2 + 2) * 6 * expert
    assert found.total == 2 * embedding + 24 + dense + 2 * moe + mtp
    assert found.active == embedding + 24 + dense + 2 * active_moe


def test_moonlet_has_its_published_size() -> None:
    config = ModelConfig(
        vocab_size=201_088,
        dim=2048,
        n_layers=12,
        n_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        inter_dim=11_264,
        moe_inter_dim=1408,
        n_routed_experts=64,
        n_activated_experts=6,
        n_shared_experts=2,
    )
    assert count_parameters(config).total == pytest.approx(7.34e9, rel=1e-3)


@pytest.mark.parametrize("name", ["mla", "swa", "sdpa"])
def test_flops_by_hand(name: str) -> None:
    """6 a parameter that a token meets; 6·H·(d_qk + d_v) for every key that it sees, token by token."""
    config, length = ModelConfig(**SHAPE, **CONFIGS[name]), 10
    attention = (24 * 20 + 14 * 24 + 10 + 22 * 10 + 10 * 24) if name != "sdpa" else 4 * 24 * 28
    expert = 3 * 7 * 24
    active = 97 * 24 + 24 + 3 * (attention + 48) + 3 * 30 * 24 + 2 * (6 * 24 + 4 * expert)
    widths = 28 if name == "sdpa" else 10 + 5
    windows = [4, 10, 10] if name == "swa" else [10, 10, 10]
    # A token's mean number of keys, half of its own position counted: the area under min(position, window).
    keys = sum(sum((min(t, w) + min(t + 1, w)) / 2 for t in range(length)) / length for w in windows)
    expected = 6 * active + 6 * 2 * widths * keys
    assert flops_per_token(config, length) == pytest.approx(expected, rel=1e-12)


def test_flops_leave_mtp_and_embedding_out() -> None:
    plain = ModelConfig(**SHAPE, **CONFIGS["mla"])
    assert flops_per_token(plain.model_copy(update={"mtp_depth": 2}), 16) == flops_per_token(plain, 16)
    wider = ModelConfig(**(SHAPE | {"vocab_size": 98}), **CONFIGS["mla"])
    assert flops_per_token(wider, 16) - flops_per_token(plain, 16) == 6 * 24, "one more row of the head alone"


def test_flops_of_a_window_stop_growing() -> None:
    config = ModelConfig(**SHAPE, **CONFIGS["swa"])
    per_layer = [flops_per_token(config, n + 1) - flops_per_token(config, n) for n in (1000, 2000)]
    # Two global layers grow by half a key a token; the local one's share vanishes with 1 / n².
    assert per_layer == pytest.approx([2 * 6 * 2 * 15 * 0.5] * 2, rel=1e-4)
