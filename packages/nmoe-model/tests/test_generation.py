"""Sampling by its definition on scripted logits, and generation with a cache against the whole forward each time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nmoe.model.errors import ModelError
from nmoe.model.generation import Sampling, _choose, generate

GREEDY = Sampling(temperature=0.0)


class Scripted:
    """Stands for a model: gives each step's logits from a list, and notes what it was fed."""

    def __init__(self, *steps: list[float]) -> None:
        self.steps = [torch.tensor(step) for step in steps]
        self.config = SimpleNamespace(vocab_size=len(steps[0]), n_layers=1)
        self.head = SimpleNamespace(weight=torch.zeros(1))
        self.fed: list[list[int]] = []

    def logits(self, token_BS: torch.Tensor, cache: Any, *, last_only: bool) -> torch.Tensor:
        self.fed.append(token_BS[0].tolist())
        return self.steps[len(self.fed) - 1].view(1, 1, -1)


def run(model: Any, prompt: list[int], sampling: Sampling = GREEDY, max_tokens: int = 8, eos: int = 0, n_ids: int = 4):
    return list(generate(model, prompt, max_tokens=max_tokens, sampling=sampling, eos_id=eos, n_ids=n_ids))


def draws(probabilities: list[float], sampling: Sampling, count: int = 4000) -> list[float]:
    """Frequency of each token."""
    logits, generator = torch.tensor(probabilities).log(), torch.Generator().manual_seed(0)
    found = [_choose(logits, sampling, generator) for _ in range(count)]
    return [found.count(token) / count for token in range(len(probabilities))]


@pytest.mark.parametrize("name", ["mla_swa_mtp", "everything", "sdpa_swa_mtp", "sdpa"])
def test_greedy_equals_the_argmax_of_whole_forwards(tiny, build, name: str) -> None:
    """Past the window of 3 and past the original context of 4, one token at a time from the cache."""
    config = tiny(name)
    model = build(config).eval()
    prompt = [3, 1, 4, 1, 5]
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(10):
            logits = model.logits(torch.tensor([expected]))[0, -1]
            best = logits.sort(descending=True).values
            assert best[0] - best[1] > 1e-9, "no tie to be decided by rounding"
            expected.append(int(logits.argmax()))
    found = run(model, prompt, max_tokens=10, eos=-1, n_ids=config.vocab_size)
    assert found == expected[5:]
    assert len(set(found)) > 2, "a sequence worth comparing"


def test_the_seed_decides_the_text(tiny, build) -> None:
    config = tiny("mla")
    model = build(config).eval()
    texts = [
        run(model, [1, 2], Sampling(seed=seed), max_tokens=20, eos=-1, n_ids=config.vocab_size) for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(texts[0]) == 20


def test_generation_leaves_no_trace_on_the_model(tiny, build) -> None:
    config = tiny("mla")
    model = build(config).eval()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run(model, [1, 2], Sampling(seed=3), eos=-1, n_ids=config.vocab_size)
    assert torch.equal(torch.get_rng_state(), state), "sampling has a generator of its own"
    assert all(not router.load.any() for _, router in model.routers())


def test_the_prompt_goes_in_whole_and_then_token_by_token() -> None:
    model = Scripted([0, 0, 5, 0], [0, 5, 0, 0], [0, 0, 0, 5.0])
    assert run(model, [3, 3, 1], max_tokens=3) == [2, 1, 3]
    assert model.fed == [[3, 3, 1], [2], [1]]


def test_eos_ends_the_text_and_is_not_part_of_it() -> None:
    model = Scripted([0, 0, 5, 0], [5, 0, 0, 0], [0, 0, 0, 5.0])
    assert run(model, [1]) == [2]
    assert len(model.fed) == 2, "nothing is computed after the end"


def test_max_tokens_bounds_the_text() -> None:
    assert run(Scripted([0, 0, 5, 0.0]), [1], max_tokens=0) == []
    assert run(Scripted(*[[0, 0, 5, 0.0]] * 2), [1], max_tokens=2) == [2, 2]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=1), Sampling(temperature=50.0, seed=2)])
def test_rows_of_a_padded_vocabulary_are_never_chosen(sampling: Sampling) -> None:
    model = Scripted(*[[0.0, 1.0, 1.0, 9.0, 99.0]] * 30)
    found = run(model, [1], sampling, max_tokens=30, eos=-1, n_ids=3)
    assert len(found) == 30
    assert set(found) <= {0, 1, 2}


def test_greedy_takes_the_lower_id_of_equals() -> None:
    assert run(Scripted([0, 7, 7, 7.0]), [1], max_tokens=1) == [1]


def test_sampling_follows_the_softmax() -> None:
    probabilities = [0.5, 0.25, 0.125, 0.125]
    # Five standard errors of a frequency of one half over 4000 draws are 0.04.
    assert draws(probabilities, Sampling()) == pytest.approx(probabilities, abs=0.04)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    probabilities = [0.5, 0.25, 0.125, 0.125]
    powers = [p ** (1 / temperature) for p in probabilities]
    expected = [p / sum(powers) for p in powers]
    assert draws(probabilities, Sampling(temperature=temperature)) == pytest.approx(expected, abs=0.04)


def test_a_low_temperature_is_nearly_greedy() -> None:
    assert draws([0.3, 0.4, 0.3], Sampling(temperature=1e-3), 200) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (1e-6, {1}),  # never empty
        (0.5, {1}),  # exactly reached by the first
        (0.51, {1, 0}),  # equals: the lower id first
        (0.75, {1, 0}),
        (0.76, {1, 0, 3}),
        (1.0, {0, 1, 3}),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, nucleus: set[int]) -> None:
    probabilities = [0.25, 0.5, 0.0, 0.25]
    found = draws(probabilities, Sampling(top_p=top_p), 2000)
    assert {token for token, share in enumerate(found) if share} == nucleus
    total = sum(probabilities[token] for token in nucleus)
    expected = [p / total if token in nucleus else 0.0 for token, p in enumerate(probabilities)]
    assert found == pytest.approx(expected, abs=0.06), "what remains keeps its proportions"


def test_the_nucleus_is_of_the_tempered_distribution() -> None:
    """At temperature 0.5, [0.6, 0.4] is [0.69, 0.31]: 0.65 is reached by the first token alone."""
    assert draws([0.6, 0.4], Sampling(temperature=0.5, top_p=0.65), 200) == [1.0, 0.0]
    assert min(draws([0.6, 0.4], Sampling(top_p=0.65), 200)) > 0


@pytest.mark.parametrize("prompt", [[], [4], [1, -1]])
def test_refuses_a_prompt_without_tokens_or_with_foreign_ones(prompt: list[int]) -> None:
    with pytest.raises(ModelError, match="below 4"):
        run(Scripted([0, 0, 0, 0.0]), prompt)


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_refuses_sampling_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ModelError, match=r"expected temperature .* found"):
        Sampling(**options)
