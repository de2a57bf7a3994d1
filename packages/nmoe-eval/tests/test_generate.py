"""Texts made many at once are those made one by one, however they are batched, and on however many ranks."""

import threading
from itertools import takewhile

import pytest
import torch
from nmoe.eval.errors import RequestError
from nmoe.eval.generate import choose, generate_texts, plan
from nmoe.eval.requests import GenerateRequest
from nmoe.kernels.ops import select_ops
from nmoe.model.generation import Sampling, generate
from nmoe.model.schema import ModelConfig
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import LocalTransport
from nmoe.rdep.world import World

KINDS = {
    "mla": {"attn": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14},
    "sdpa-swa": {"attn": "sdpa", "head_dim": 8, "attn_local": "swa", "attn_global_every": 2, "attn_local_window": 5},
}
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
ROOM = 64


class Letters:
    """A letter an id; the last id ends a text. The model's vocabulary has one id more."""

    name, eos_id, n_vocab, fingerprint = "letters", len(LETTERS), len(LETTERS) + 1, "f"

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[number] for number in ids if number < len(LETTERS) and number != self.eos_id)


def build(kind):
    config = ModelConfig(
        vocab_size=len(LETTERS) + 2, dim=32, n_layers=3, n_heads=3, inter_dim=40, moe_inter_dim=16,
        n_routed_experts=8, n_activated_experts=3, **KINDS[kind],
    )  # fmt: skip
    ops = select_ops("reference", "cpu")
    model = Transformer.build(config, ops, LocalTransport(), device="cpu", dtype=torch.float64, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # sharp, so that a wrong position cannot go unseen
                parameter.mul_(2 * parameter.shape[-1] ** -0.5 / config.init_std)
        model.head.weight[-2] = 0  # texts end seldom
        model.head.weight[-1] *= 50  # the id that means nothing would often be the likeliest
    return model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param)


def asked(**options):
    prompts = ["the quick brown fox", "a", "jumps over", "the lazy dog. it was", "zz", "over and over and over again"]
    return [
        GenerateRequest(tuple(Letters().encode(prompt)), **{"stops": (), "max_new": 12 + 3 * (i % 3), **options})
        for i, prompt in enumerate(prompts)
    ]


def made(model, requests, max_tokens=10_000, **options):
    return generate_texts(model, Letters(), requests, max_tokens=max_tokens, max_length=ROOM, **options)


def one_by_one(model, request):
    """As nmoe.model makes it, greedily."""
    ids = list(
        generate(
            model, request.prompt[-(ROOM - request.max_new) :], max_tokens=request.max_new,
            sampling=Sampling(temperature=0.0), eos_id=None, n_ids=Letters.n_vocab,
        )
    )  # fmt: skip
    return Letters().decode(takewhile(lambda number: number != Letters.eos_id, ids))


@pytest.mark.parametrize("max_tokens", [1, 70, 100, 10_000])
def test_greedy_texts_are_those_made_one_by_one(model, max_tokens):
    requests = asked()
    found = made(model, requests, max_tokens)
    assert [texts[0].text for texts in found] == [one_by_one(model, request) for request in requests]
    for request, (text,) in zip(requests, found, strict=True):
        assert text.ended == (
            "length" if text.n_tokens == request.max_new and len(text.text) == text.n_tokens else "eos"
        )


def test_a_text_ends_before_its_first_stop(model):
    requests = asked(max_new=20)
    for (whole,) in made(model, requests):
        assert len(whole.text) > 4
    for request, (whole,) in zip(requests, made(model, requests), strict=True):
        for start in (0, 3, len(whole.text) - 2):
            stop = whole.text[start : start + 2]
            cut = whole.text.index(stop)
            ((text,),) = made(model, [GenerateRequest(request.prompt, ("!?", stop), 20)])
            assert (text.text, text.ended, text.n_tokens) == (whole.text[:cut], "stop", cut + 2)


def test_the_end_of_text_ends_a_row_and_not_the_others(model):
    """The id that the first text's third token has is made the one that ends texts."""
    requests = asked(max_new=16)
    plain = made(model, requests)
    third = Letters().encode(plain[0][0].text)[2]

    class Ends(Letters):
        eos_id = third

    found = generate_texts(model, Ends(), requests, max_tokens=10_000, max_length=ROOM)
    for (text,), (whole,) in zip(found, plain, strict=True):
        letter = LETTERS[third]
        if letter in whole.text:
            assert (text.text, text.ended) == (whole.text.partition(letter)[0], "eos")
            assert text.n_tokens == len(text.text) + 1
        else:
            assert text.text == whole.text
    assert found[0][0].n_tokens <= 3


@pytest.mark.parametrize("max_tokens", [1, 100, 200])
def test_samples_do_not_depend_on_the_batch(model, max_tokens):
    requests = asked(temperature=0.9, top_p=0.95, n=3, seed=5)
    whole = made(model, requests)
    assert made(model, requests, max_tokens) == whole
    assert made(model, requests[2:3])[0] == whole[2]
    assert made(model, list(reversed(requests)))[::-1] == whole
    assert all(len({text.text for text in texts}) == 3 for texts in whole), "samples differ"
    other = made(model, asked(temperature=0.9, top_p=0.95, n=3, seed=6))
    assert all(mine != theirs for mine, theirs in zip(whole, other, strict=True))
    # The first samples of more are the same.
    more = made(model, asked(temperature=0.9, top_p=0.95, n=5, seed=5))
    assert [texts[:3] for texts in more] == whole


def test_greedy_and_sampled_rows_share_a_batch(model):
    greedy, sampled = asked(), asked(temperature=1.3, seed=2)
    found = made(model, greedy + sampled)
    assert found == made(model, greedy) + made(model, sampled)


def test_a_prompt_that_does_not_fit_loses_its_left(model):
    long = GenerateRequest(tuple(Letters().encode("the quick brown fox jumps " * 4)), (), 10)
    ((text,),) = made(model, [long])
    assert text.n_cropped == len(long.prompt) - (ROOM - 10)
    assert text.text == one_by_one(model, long)
    ((short,),) = made(model, [GenerateRequest(long.prompt[-(ROOM - 10) :], (), 10)])
    assert (short.text, short.n_cropped) == (text.text, 0)


@pytest.mark.parametrize("wrong", [{"prompt": ()}, {"max_new": 0}, {"n": 0}, {"max_new": ROOM}])
def test_what_cannot_be_made_is_refused_by_number(model, wrong):
    fine = GenerateRequest((1,), (), 3)
    with pytest.raises(RequestError, match="request 1"):
        made(model, [fine, GenerateRequest(**{"prompt": (1,), "stops": (), "max_new": 3, **wrong})])


def test_batches_hold_to_their_bound():
    requests = [GenerateRequest((1,) * length, (), new, n=3) for length, new in ((5, 4), (9, 1), (2, 30), (9, 2))]
    batches = plan(requests, [len(request.prompt) for request in requests], 40)
    for rows in batches:
        widest = max(len(requests[row.request].prompt) + requests[row.request].max_new for row in rows)
        assert len(rows) == 1 or len(rows) * widest <= 40
    flat = [(row.request, row.sample) for rows in batches for row in rows]
    assert sorted(flat) == [(request, sample) for request in range(4) for sample in range(3)]
    assert len(batches) < len(flat)


def test_samples_have_the_nucleus_distribution():
    """Of many uniform numbers, evenly spaced, each id is chosen as often as it should be."""
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 3.0]]).expand(100_000, -1)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    temperature, top_p = torch.full((100_000,), 1.7, dtype=torch.float64), 0.8
    chosen = choose(logits, temperature, torch.full_like(temperature, top_p), uniform)
    probability = (logits[0].double() / 1.7).softmax(-1)
    # Sorted: ids 4, 1, 2, 0, 3; the smallest set that reaches 0.8.
    kept, total = [], 0.0
    for number in (4, 1, 2, 0, 3):
        if total < top_p:
            kept.append(number)
            total += float(probability[number])
    assert len(kept) == 3
    for number in range(5):
        share = float(probability[number]) / total if number in kept else 0.0
        assert float((chosen == number).double().mean()) == pytest.approx(share, abs=2e-5)


def test_the_smallest_nucleus_is_greedy():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(50, dtype=torch.float64)
    assert torch.equal(choose(logits, ones, ones * 1e-12, ones * 0.999999), logits.argmax(-1))


# ---- ranks ---------------------------------------------------------------------------------------------------------


class Ranks:
    """Threads that meet."""

    def __init__(self, size):
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=60), [None] * size

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class Rank(World):
    def __init__(self, rank, ranks):
        super().__init__(rank, ranks.size, torch.device("cpu"))
        self.ranks, self.sums = ranks, 0

    def sum_(self, tensor):
        self.sums += 1
        tensor.copy_(sum(self.ranks.exchange(self.rank, tensor.clone())))

    def share(self, name, value, timeout_s=None):
        return self.ranks.exchange(self.rank, value)


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_and_call_the_model_equally_often(size, count, monkeypatch):
    model = build("mla")
    requests = asked(max_new=40, stops=("e", "zz"), n=2, temperature=0.7)[:count]
    alone = made(model, requests, 100)
    calls, hidden = [0] * size, Transformer.hidden
    number = threading.local()

    def counted(self, *arguments, **options):
        calls[number.rank] += 1
        return hidden(self, *arguments, **options)

    monkeypatch.setattr(Transformer, "hidden", counted)
    ranks, found, worlds = Ranks(size), [None] * size, [None] * size

    def run(rank):
        number.rank = rank
        worlds[rank] = Rank(rank, ranks)
        found[rank] = made(model, requests, 100, world=worlds[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * size
    assert len(set(calls)) == 1, "a rank that calls less often would keep the others waiting"
    assert worlds[0].sums < calls[0] / 2 or calls[0] < 4


def test_progress_tells_how_many_texts_are_made(model):
    told = []
    made(model, asked(n=2), 100, progress=lambda *now: told.append(now))
    assert [total for _, total in told] == [12] * len(told)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (12, 12)
    assert len(told) > 1
