"""The reference balance loss: against the equations in loops, its gradient, and what it is for even choices."""

import math

import pytest
import torch
from nmoe.kernels.reference.balance import balance_loss

TOKENS, EXPERTS, TOP_K = 12, 5, 2


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64) * 2
    return logits, (logits + torch.randn(EXPERTS)).topk(TOP_K, dim=-1).indices


def naive(logits: torch.Tensor, expert: torch.Tensor, n_sequences: int, weight: float, mistake: str = "") -> float:
    """DeepSeek-V3 report, equations 17 to 20, in Python's floats."""
    tokens = list(zip(logits.tolist(), expert.tolist(), strict=True))
    length = TOKENS // n_sequences
    total = 0.0
    for g in range(n_sequences):
        sequence = tokens[g::n_sequences] if mistake == "tokens interleaved" else tokens[g * length :][:length]
        f, p = [0.0] * EXPERTS, [0.0] * EXPERTS
        for logit, chosen in sequence:
            if mistake == "softmax":
                score = [math.exp(x) for x in logit]
            else:
                score = [1 / (1 + math.exp(-x)) for x in logit]
            for e in chosen[:1] if mistake == "first choice alone" else chosen:
                f[e] += EXPERTS / (length * (1 if mistake == "K left out" else TOP_K))
            for e in range(EXPERTS):
                p[e] += score[e] / (1 if mistake == "not normalised" else sum(score)) / length
        total += weight * sum(a * b for a, b in zip(f, p, strict=True))
    return total / (n_sequences if mistake == "mean over sequences" else 1)


@pytest.mark.parametrize("n_sequences", [1, 3, TOKENS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_the_equations(n_sequences: int, dtype: torch.dtype) -> None:
    logits, expert = draw()
    found = balance_loss(logits, expert.to(dtype), n_sequences=n_sequences, weight=0.3)
    assert found.shape == ()
    assert float(found) == pytest.approx(naive(logits, expert, n_sequences, 0.3), rel=1e-13)


@pytest.mark.parametrize(
    "mistake",
    [
        "tokens interleaved",
        "softmax",
        "first choice alone",
        "K left out",
        "not normalised",
        "mean over sequences",
    ],
)
def test_the_equations_tell_mistakes_apart(mistake: str) -> None:
    logits, expert = draw()
    found = float(balance_loss(logits, expert, n_sequences=3, weight=0.3))
    assert abs(found / naive(logits, expert, 3, 0.3, mistake) - 1) > 1e-3


def test_gradient_by_finite_differences() -> None:
    logits, expert = draw()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, expert, n_sequences=3, weight=0.3), (logits,))


def test_even_choices_pay_the_weight_of_each_sequence() -> None:
    """Whatever the shares: it is what makes weights of different shapes comparable."""
    expert = torch.stack([torch.arange(10) % EXPERTS, (torch.arange(10) + 1) % EXPERTS], 1)
    logits = torch.randn(10, EXPERTS, dtype=torch.float64)
    assert float(balance_loss(logits, expert, n_sequences=2, weight=0.25)) == pytest.approx(0.5, rel=1e-14)
