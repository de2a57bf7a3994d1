"""Cached generation computes what the full forward computes: latents instead of keys and values, windows, positions."""

import pytest
import torch
from nmoe.kernels.ops import select_ops
from nmoe.model.cache import Cache
from nmoe.model.schema import ModelConfig, YarnConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

LENGTH = 18
TOLERANCE = 1e-11
"""Of the largest logit, in float64: two orders of summation over a few hundred terms, through three layers."""

SHAPE = {
    "vocab_size": 53,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 3,
    "inter_dim": 40,
    "moe_inter_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_activated_experts": 3,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
}
MLA = {"attn": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
SDPA = {"attn": "sdpa", "head_dim": 8}
SWA = {"attn_local": "swa", "attn_global_every": 2, "attn_local_window": 5}
YARN = {"yarn": YarnConfig(factor=4.0, original_seq_len=8, mscale=0.7, mscale_all_dim=1.3)}
KINDS = {
    "mla": MLA,
    "mla-q-lora": {**MLA, "q_lora_rank": 9},
    "mla-swa": {**MLA, **SWA},
    "mla-yarn": {**MLA, **YARN},
    "mla-q-lora-swa-yarn": {**MLA, "q_lora_rank": 9, **SWA, **YARN},
    "sdpa": SDPA,
    "sdpa-qk-norm": {**SDPA, "qk_norm": True},
    "sdpa-swa": {**SDPA, **SWA},
    "sdpa-swa-yarn": {**SDPA, **SWA, **YARN},
}
CHUNKS = {
    "token-by-token": [1] * LENGTH,
    "prefill-then-decode": [11] + [1] * (LENGTH - 11),
    "chunks": [3, 4, 1, 6, 2, 1, 1],
}


def build(kind):
    config = ModelConfig(**SHAPE, **KINDS[kind])
    ops = select_ops("reference", "cpu")
    model = Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=torch.float64, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Sharp attention and logits, so that a wrong position or a missing key cannot average out.
            if parameter.dim() > 1:
                parameter.mul_(2 * parameter.shape[-1] ** -0.5 / model.config.init_std)
    return model


def tokens():
    return torch.randint(SHAPE["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def cached_logits(model, token_BS, chunks):
    cache = Cache(model.config.n_layers, LENGTH)
    out = []
    for chunk in token_BS.split(chunks, dim=1):
        out.append(model.logits(chunk, cache))
    assert cache.length == LENGTH
    return torch.cat(out, dim=1)


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_full_forward(kind, chunks):
    model, token_BS = build(kind), tokens()
    with torch.no_grad():
        full = model.logits(token_BS)
    assert full.std() > 0.5
    assert gap(cached_logits(model, token_BS, CHUNKS[chunks]), full) < TOLERANCE


@pytest.mark.parametrize("kind", ["mla-swa", "sdpa-swa"])
def test_window_is_in_use(kind):
    """The last logits change with the window: the comparison above would see a decode step that ignores it."""
    model, token_BS = build(kind), tokens()
    with torch.no_grad():
        before = model.logits(token_BS)
        for layer in model.layers:
            layer.attn.window = None
        after = model.logits(token_BS)
    assert gap(after[:, :5], before[:, :5]) < TOLERANCE
    assert gap(after[:, -1], before[:, -1]) > 1e-3


def test_no_future_token_is_seen():
    """Logits of the first positions depend on the first tokens alone, whatever the kind of attention."""
    token_BS = tokens()
    other = torch.cat((token_BS[:, :13], (token_BS[:, 13:] + 1) % SHAPE["vocab_size"]), dim=1)
    for kind in KINDS:
        model = build(kind)
        with torch.no_grad():
            assert gap(model.logits(other)[:, :13], model.logits(token_BS)[:, :13]) < TOLERANCE


def test_last_only_is_the_last_position():
    model, token_BS = build("mla-swa"), tokens()
    with torch.no_grad():
        full, last = model.logits(token_BS), model.logits(token_BS, last_only=True)
    assert last.shape == (2, 1, SHAPE["vocab_size"])
    assert gap(last, full[:, -1:]) < TOLERANCE
