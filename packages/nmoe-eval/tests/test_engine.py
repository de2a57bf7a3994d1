"""Scores against one plain forward call for each request; how requests are put together changes nothing."""

import random

import pytest
import torch
import torch.nn.functional as F
from nmoe.eval import engine as engine_module
from nmoe.eval import packing
from nmoe.eval.engine import Engine
from nmoe.eval.errors import EvalError, RequestError
from nmoe.eval.packing import batches_of, pack, rows_of, scored
from nmoe.eval.requests import ScoreRequest
from nmoe.kernels.ops import select_ops
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport

VOCAB = 37
MLA = {"attn": "mla", "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 3}
SWA = {"attn": "sdpa", "head_dim": 6, "attn_local": "swa", "attn_global_every": 2, "attn_local_window": 5}


def build(dtype=torch.float64, **changes):
    config = ModelConfig(
        vocab_size=VOCAB, dim=12, n_layers=3, n_heads=2, init_std=0.4, inter_dim=10, moe_inter_dim=5,
        n_routed_experts=6, n_activated_experts=2, n_shared_experts=1, **(changes or MLA),
    )  # fmt: skip
    ops = select_ops("reference", "cpu")
    return Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=dtype, seed=1)


@pytest.fixture(scope="module", params=["mla", "swa"])
def model(request):
    return build() if request.param == "mla" else build(**SWA)


def draw(rng, n):
    return tuple(rng.randrange(VOCAB) for _ in range(n))


def mixed(seed=0):
    """Choices of one question, questions behind one prefix, lone texts, repeated ones, and continuations of each
    other."""
    rng = random.Random(seed)
    requests = []
    for _ in range(4):
        context = draw(rng, rng.randint(3, 30))
        requests += [ScoreRequest(context, draw(rng, rng.randint(1, 9))) for _ in range(rng.randint(1, 5))]
    prefix = draw(rng, 20)
    for _ in range(6):
        question = prefix + draw(rng, rng.randint(2, 8))
        requests += [ScoreRequest(question, (letter,)) for letter in range(4)]
        requests += [ScoreRequest(question, draw(rng, 3)) for _ in range(2)]
    requests += [ScoreRequest(draw(rng, 1), draw(rng, 1)) for _ in range(3)]
    requests += [requests[0], requests[5]]
    long = draw(rng, 12)
    requests += [ScoreRequest(long[:n], long[n:]) for n in (1, 4, 11)]
    requests += [ScoreRequest(long[:4], long[4:n]) for n in (5, 9)]
    rng.shuffle(requests)
    return requests


def plain(model, request, max_length=10**6):
    """(log-probability, greedy) by one forward call, token by token."""
    tokens = torch.tensor((request.context + request.continuation[:-1])[-max_length:])
    with torch.no_grad():
        logits = model.eval().logits(tokens[None])[0, -len(request.continuation) :]
    total = sum(F.log_softmax(row, -1)[token].item() for row, token in zip(logits, request.continuation, strict=True))
    return total, logits.argmax(-1).tolist() == list(request.continuation)


@pytest.mark.parametrize("max_tokens", [40, 64, 200, 5000])
def test_scores_are_those_of_one_forward_call_each(model, max_tokens):
    requests = mixed()
    # Some continuations that the model would choose itself.
    for request in list(requests[:6]):
        tokens = list(request.context)
        for _ in range(3):
            with torch.no_grad():
                tokens.append(int(model.eval().logits(torch.tensor([tokens]))[0, -1].argmax()))
        requests.append(ScoreRequest(request.context, tuple(tokens[len(request.context) :])))
    found = Engine(model, max_length=40, max_tokens=max_tokens).score(requests)
    expected = [plain(model, request) for request in requests]
    assert [each.logprob for each in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-10)
    assert [each.greedy for each in found] == [greedy for _, greedy in expected]
    assert sum(each.greedy for each in found) >= 6
    assert [each.n_tokens for each in found] == [len(request.continuation) for request in requests]
    assert not any(each.n_cropped for each in found)


def test_too_long_a_context_is_cropped_from_the_left_and_counted(model):
    requests = mixed()
    found = Engine(model, max_length=12, max_tokens=60).score(requests)
    lengths = [len(request.context) + len(request.continuation) - 1 for request in requests]
    assert [each.n_cropped for each in found] == [max(0, length - 12) for length in lengths]
    assert any(each.n_cropped for each in found)
    expected = [plain(model, request, 12)[0] for request in requests]
    assert [each.logprob for each in found] == pytest.approx(expected, rel=1e-10)


def test_what_is_shared_is_computed_once(model, monkeypatch):
    """A prefix of 300 tokens, 20 questions of 10, 4 choices of 3: not 20 · 4 · 312 tokens."""
    rng = random.Random(1)
    prefix = draw(rng, 300)
    questions = [prefix + draw(rng, 10) for _ in range(20)]
    requests = [ScoreRequest(question, draw(rng, 3)) for question in questions for _ in range(4)]
    seen = []
    hidden = Transformer.hidden

    def counted(self, token_BS, *args, **kwargs):
        seen.append(token_BS.numel())
        return hidden(self, token_BS, *args, **kwargs)

    monkeypatch.setattr(Transformer, "hidden", counted)
    found = Engine(model, max_length=400, max_tokens=2000).score(requests)
    whole = {(*request.context, *request.continuation[:-1]) for request in requests}
    beginnings = {tokens[:n] for tokens in whole for n in range(1, len(tokens) + 1)}
    assert sum(seen) == len(beginnings) <= 300 + 20 * (10 + 4 * 2)
    assert [each.logprob for each in found[::9]] == pytest.approx(
        [plain(model, request)[0] for request in requests[::9]], rel=1e-10
    )


def test_batches_hold_every_request_once_and_keep_to_the_budget():
    requests = mixed(3)
    for max_tokens in (40, 90, 1000):
        rows = rows_of(scored(requests, 40), max_tokens)
        assert sorted(each.request for row in rows for each in row.sequences) == list(range(len(requests)))
        batches = batches_of(rows, max_tokens)
        assert sum(len(batch) for batch in batches) == len(rows)
        for batch in batches:
            packed = pack(batch)
            assert packed.token_BS.size <= max_tokens
            assert packed.token_BS.shape == (len(batch), max(row.n_tokens for row in batch))
        lengths = [row.n_tokens for batch in batches for row in batch]
        assert lengths == sorted(lengths, reverse=True)


def test_a_row_ends_where_sharing_does_not_pay():
    """Questions that have only a word in common are rows of their own: attention between branches would be waste."""
    rng = random.Random(2)
    requests = [ScoreRequest((5, *draw(rng, 50)), draw(rng, 4)) for _ in range(7)]
    assert len(rows_of(scored(requests, 100), 10_000)) == 7
    few = packing._LEAST_BRANCHES // 100
    prefix = draw(rng, 60)
    many = [ScoreRequest(prefix + draw(rng, 99), (1, 2)) for _ in range(3 * few)]
    rows = rows_of(scored(many, 1000), 100_000)
    assert 3 <= len(rows) <= 4
    assert all(row.n_tokens <= 60 + packing._LEAST_BRANCHES for row in rows)


@pytest.mark.parametrize("elements", [1, VOCAB, 5 * VOCAB, 10**6])
def test_chunks_of_logits_change_nothing_and_stay_small(model, monkeypatch, elements):
    monkeypatch.setattr(engine_module, "_CHUNK_ELEMENTS", elements)
    seen, mm_into = [], engine_module.mm_into

    def noted(into, *args, **kwargs):
        seen.append(into.numel())
        return mm_into(into, *args, **kwargs)

    monkeypatch.setattr(engine_module, "mm_into", noted)
    requests = mixed(5)
    found = Engine(model, max_length=64, max_tokens=300).score(requests)
    assert [each.logprob for each in found] == pytest.approx([plain(model, r)[0] for r in requests], rel=1e-10)
    assert max(seen) <= max(elements, VOCAB)
    read = {(request.context + request.continuation)[:n] for request in requests
            for n in range(len(request.context), len(request.context + request.continuation))}  # fmt: skip
    assert sum(seen) <= 2 * len(read) * VOCAB, "only what predicts a continuation is projected"


def test_one_thing_at_a_time_gives_the_same(model):
    requests = mixed(7)
    together = Engine(model, max_length=64, max_tokens=500).score(requests)
    alone = [Engine(model, max_length=64, max_tokens=500).score([request])[0] for request in requests]
    assert [each.logprob for each in together] == pytest.approx([each.logprob for each in alone], rel=1e-10)
    again = Engine(model, max_length=64, max_tokens=500).score(requests)
    assert again == together, "the same bits"


def test_bf16_is_scored_in_fp32():
    """Logits rounded to bf16 would be off by a hundredth; what remains is the states' own rounding."""
    model = build(torch.bfloat16).eval()
    requests = [ScoreRequest((1, 2, 3), (4,)), ScoreRequest((7, 8), (9, 3))]
    found = Engine(model, max_length=16, max_tokens=32).score(requests)
    for request, each in zip(requests, found, strict=True):
        with torch.no_grad():
            state = model.hidden(torch.tensor([request.context + request.continuation[:-1]]))[0]
        logits = state[-len(request.continuation) :].float() @ model.head.weight.float().t()
        expected = logits.log_softmax(-1)[range(len(request.continuation)), request.continuation].sum().item()
        assert each.logprob == pytest.approx(expected, abs=1e-4)


def test_progress_is_told_up_to_the_end_and_the_mode_is_left(model):
    told = []
    model.train()
    Engine(model, max_length=64, max_tokens=100).score(mixed(), lambda done, total: told.append((done, total)))
    assert model.training
    done = [each for each, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] > 0
    assert len(told) > 2
    assert Engine(model, max_length=4, max_tokens=4).score([]) == []


def test_refuses_what_no_model_could_answer(model):
    engine = Engine(model, max_length=8, max_tokens=8)
    with pytest.raises(RequestError, match="request 1: expected at least one token of continuation"):
        engine.score([ScoreRequest((1,), (2,)), ScoreRequest((1,), ())])
    with pytest.raises(RequestError, match="token of context"):
        engine.score([ScoreRequest((), (2,))])
    with pytest.raises(RequestError, match=r"at most 8 tokens.* found 9"):
        engine.score([ScoreRequest((1,), tuple(range(9)))])
    with pytest.raises(EvalError, match="one sequence of 9 tokens"):
        Engine(model, max_length=9, max_tokens=8)
