"""The engine on a GPU, in bf16 with native kernels, against one forward call for each request."""

import random

import pytest
import torch
from nmoe.eval.engine import Engine
from nmoe.eval.requests import ScoreRequest
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

pytestmark = pytest.mark.gpu
VOCAB = 4096


def build(*, vocab=VOCAB, **changes):
    shape = {
        "vocab_size": vocab, "dim": 256, "n_layers": 4, "n_heads": 4, "init_std": 0.06, "inter_dim": 512,
        "moe_inter_dim": 128, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "attn": "mla",
        "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "attn_local": "swa",
        "attn_local_window": 64, "attn_global_every": 2,
    }  # fmt: skip
    config = ModelConfig(**(shape | changes))
    ops = select_ops("native", "cuda")
    model = Transformer.build(config, ops, LocalTransport(), device="cuda", dtype=torch.bfloat16, seed=1)
    return model.eval()


def mixed(n=24):
    """Questions with choices, questions behind one long prefix, and texts alone."""
    rng = random.Random(0)

    def draw(low, high):
        return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(low, high)))

    requests = []
    for _ in range(n):
        context = draw(20, 300)
        requests += [ScoreRequest(context, draw(1, 30)) for _ in range(4)]
    prefix = draw(250, 250)
    for _ in range(n):
        question = prefix + draw(10, 60)
        requests += [ScoreRequest(question, (letter,)) for letter in range(4)]
        requests += [ScoreRequest(question, draw(2, 5))]
    requests += [ScoreRequest(draw(1, 400), draw(1, 40)) for _ in range(n)]
    return requests


def off(found, model, requests):
    """How far each log-probability is from that of a plain call, a token."""
    errors = []
    for each, request in zip(found, requests, strict=True):
        tokens = torch.tensor([[*request.context, *request.continuation][:-1]], device="cuda")
        with torch.no_grad():
            state = model.hidden(tokens)[0, -len(request.continuation) :].float()
        logprob = (state @ model.head.weight.float().t()).log_softmax(-1)
        expected = logprob[range(len(request.continuation)), list(request.continuation)].sum().item()
        errors.append(abs(each.logprob - expected) / each.n_tokens)
    return sorted(errors)


@pytest.mark.parametrize("kind", ["dense", "experts", "sdpa"])
def test_scores_are_those_of_one_call_each(kind):
    sdpa = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    changes = {
        "dense": {"n_dense_layers": 4},
        "experts": {},
        "sdpa": {"n_dense_layers": 4, "attn": "sdpa", "head_dim": 64, **sdpa},
    }
    model = build(**changes[kind])
    requests = mixed()
    found = Engine(model, max_length=512, max_tokens=8192).score(requests)
    errors = off(found, model, requests)
    # Logits of about unit size, in bf16 through four layers: some 2^-6 apart where sums are taken in another order. A
    # token at the border between two experts may go to the other one: such are few.
    assert errors[len(errors) // 2] < 0.01
    assert errors[int(len(errors) * (0.95 if kind == "experts" else 1)) - 1] < 0.06
    assert Engine(model, max_length=512, max_tokens=8192).score(requests) == found, "the same bits"


def test_memory_does_not_grow_with_the_vocabulary():
    """All places of many rows are read: whole logits of the larger vocabulary would take gigabytes more."""
    rng = random.Random(1)
    requests = [ScoreRequest((1,), tuple(rng.randrange(1000) for _ in range(500))) for _ in range(32)]
    peaks = []
    for vocab in (65_536, 196_608):
        model = build(vocab=vocab)
        engine = Engine(model, max_length=512, max_tokens=16_384)
        engine.score(requests)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.score(requests)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del engine, model
    assert peaks[1] - peaks[0] < 64 << 20
    assert peaks[1] < 2 << 30


def test_one_token_sequences_and_single_rows():
    model = build()
    requests = [ScoreRequest((5,), (6,)), ScoreRequest((5, 6), (7, 8)), ScoreRequest((5,), (9, 8))]
    found = Engine(model, max_length=4, max_tokens=4).score(requests)
    assert off(found, model, requests)[-1] < 0.06
