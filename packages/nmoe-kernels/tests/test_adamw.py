"""AdamW against torch.optim.AdamW and against its equations in float64, and on split masters bit for bit."""

import math
from collections.abc import Sequence

import pytest
import torch
from nmoe.kernels.reference import adamw as module
from nmoe.kernels.reference.adamw import adamw_, adamw_scalars
from nmoe.kernels.reference.master import join_master, split_master

HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 6
ONE = torch.ones(())
OK, NOT_OK = (torch.tensor(word, dtype=torch.int32) for word in (1, 0))


def update(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    moments: Sequence[torch.Tensor],
    step: int,
    *,
    scale: torch.Tensor = ONE,
    ok: torch.Tensor = OK,
    **changes: float,
) -> None:
    hyper = HYPER | changes
    constants = {name: hyper[name] for name in ("beta1", "beta2", "eps")}
    numbers = adamw_scalars(**{name: hyper[name] for name in hyper if name != "eps"}, step=step)
    scalars = torch.tensor(numbers, dtype=grad.dtype)
    adamw_(weight, residual, grad, *moments, scale.to(grad.dtype), ok, scalars, **constants)


def gradients(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of many sizes: from 1e-9, where eps rules, to 1e2."""
    return [torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-9, 3, shape) for _ in range(STEPS)]


def run(weight: torch.Tensor, grads: list[torch.Tensor], **changes: float) -> tuple[torch.Tensor, ...]:
    weight, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step, grad in enumerate(grads, start=1):
        update(weight, None, grad, (m, v), step, **changes)
    return weight, m, v


def naive(weight: torch.Tensor, grads: list[torch.Tensor], mistake: str = "") -> torch.Tensor:
    """arXiv:1711.05101, algorithm 2, with float64 scalars."""
    lr, b1, b2, eps, decay = HYPER.values()
    out = []
    columns = torch.stack([weight, *grads]).double().reshape(len(grads) + 1, -1).t().tolist()
    for w, *column in columns:
        m = v = 0.0
        for step, g in enumerate(column, start=1):
            if mistake == "L2 instead of decoupled":
                g += decay * w  # noqa: PLW2901
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
            if mistake == "no bias correction":
                m_hat, v_hat = m, v
            if mistake == "eps in the root":
                update = m_hat / math.sqrt(v_hat + eps)
            elif mistake == "eps before correction":
                update = m_hat / ((math.sqrt(v) + eps) / math.sqrt(1 - b2**step))
            else:
                update = m_hat / (math.sqrt(v_hat) + eps)
            if mistake == "decay without lr":
                w *= 1 - decay  # noqa: PLW2901
            elif mistake != "L2 instead of decoupled":
                w *= 1 - lr * decay  # noqa: PLW2901
            w -= lr * update  # noqa: PLW2901
        out.append(w)
    return torch.tensor(out, dtype=torch.float64).view_as(weight)


def test_equals_the_equations_in_float64() -> None:
    weight, grads = torch.randn(40, dtype=torch.float64), gradients((40,), torch.float64)
    torch.testing.assert_close(run(weight, grads)[0], naive(weight, grads), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "mistake",
    ["L2 instead of decoupled", "no bias correction", "eps in the root", "eps before correction", "decay without lr"],
)
def test_the_equations_tell_mistakes_apart(mistake: str) -> None:
    weight, grads = torch.randn(40, dtype=torch.float64), gradients((40,), torch.float64)
    assert not torch.allclose(run(weight, grads)[0], naive(weight, grads, mistake), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"beta1": 0.8, "beta2": 0.999}, {"eps": 1e-15}])
def test_equals_torch_optim_adamw(changes: dict[str, float]) -> None:
    """Same operations, of which PyTorch fuses some: within a few roundings of what was added up after six steps."""
    weight, grads = torch.randn(7, 33), gradients((7, 33))
    hyper = HYPER | changes
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW(
        [parameter],
        lr=hyper["lr"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        foreach=False,
    )
    for grad in grads:
        parameter.grad = grad.clone()
        theirs.step()
    found, m, v = run(weight, grads, **changes)
    torch.testing.assert_close(found, parameter.detach(), rtol=2**-22, atol=2**-30)
    sizes = run(weight, [grad.abs() for grad in grads], **changes)[1]
    assert ((m - theirs.state[parameter]["exp_avg"]).abs() <= 2**-22 * sizes).all()
    torch.testing.assert_close(v, theirs.state[parameter]["exp_avg_sq"], rtol=2**-22, atol=1e-24)


def test_split_masters_are_updated_bit_for_bit_like_float32() -> None:
    master, grads = torch.randn(5, 129), gradients((5, 129))
    weight, residual = split_master(master)
    master = master.clone()
    state = [torch.zeros_like(master) for _ in range(4)]
    for step, grad in enumerate(grads, start=1):
        update(weight, residual, grad, state[:2], step)
        update(master, None, grad, state[2:], step)
        assert torch.equal(join_master(weight, residual).view(torch.int32), master.view(torch.int32))
        assert torch.equal(state[0], state[2])
        assert torch.equal(state[1], state[3])


def test_split_masters_learn_what_bfloat16_alone_would_lose() -> None:
    """Updates of 1e-4 of the weight round away in bf16, and add up in the master."""
    weight, residual = split_master(torch.ones(4))
    m, v = torch.zeros(4), torch.zeros(4)
    for step in range(1, 101):
        update(weight, residual, torch.ones(4), (m, v), step, lr=1e-4, weight_decay=0.0)
    torch.testing.assert_close(join_master(weight, residual), torch.full((4,), 0.99), rtol=1e-5, atol=0)
    assert (weight < 1).all()


def test_the_gradient_is_scaled_and_left_as_it_is() -> None:
    weight, grad = torch.randn(50), torch.randn(50)
    kept, scale = grad.clone(), torch.tensor(0.25)
    first, second = [weight.clone(), *torch.zeros(2, 50)], [weight.clone(), *torch.zeros(2, 50)]
    update(first[0], None, grad, first[1:], 1, scale=scale)
    update(second[0], None, grad * 0.25, second[1:], 1)
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1].abs().sum() < 0.3 * 0.1 * kept.abs().sum(), "the moments are of the scaled gradient"


def test_scalars() -> None:
    decay, step_size, second_moment_scale = adamw_scalars(lr=0.5, beta1=0.9, beta2=0.99, weight_decay=0.1, step=2)
    assert decay == pytest.approx(0.95, rel=1e-14)
    assert step_size == pytest.approx(0.5 / (1 - 0.81), rel=1e-14)
    assert second_moment_scale == pytest.approx(math.sqrt(1 - 0.99**2), rel=1e-14)


def test_scalars_on_the_device_give_the_bits_of_python_numbers() -> None:
    """One rounding to fp32 each, wherever it happens; and each operation rounds by itself."""
    weight, grad, m, v = torch.randn(3, 1000), torch.randn(3, 1000), torch.randn(3, 1000), torch.rand(3, 1000)
    decay, step_size, second_moment_scale = adamw_scalars(lr=3e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, step=7)
    mean = m + (grad - m) * (1 - 0.9)
    square = v * 0.95 + grad * (1 - 0.95) * grad
    expected = weight * decay - mean * step_size / (square.sqrt() / second_moment_scale + 1e-8)
    update(weight, None, grad, (m, v), 7)
    assert all(torch.equal(a, b) for a, b in zip((weight, m, v), (expected, mean, square), strict=True))


@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_without_ok_every_bit_stays(split: bool, value: float) -> None:
    master = torch.randn(100)
    weight, residual = split_master(master) if split else (master, None)
    m, v = torch.randn(100), torch.rand(100)
    state = [tensor for tensor in (weight, residual, m, v) if tensor is not None]
    kept = [tensor.clone() for tensor in state]
    update(weight, residual, torch.full((100,), value), (m, v), 3, scale=torch.tensor(value), ok=NOT_OK)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    update(weight, residual, torch.ones(100), (m, v), 3)
    assert not any(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_zeros_stay_zeros() -> None:
    """What pads a flat buffer: of all settings, since eps divides and decay multiplies."""
    weight, m, v = torch.zeros(3, 64)
    residual = torch.zeros(64, dtype=torch.int16)
    weight = weight.bfloat16()
    for step in range(1, 4):
        update(weight, residual, torch.zeros(64), (m, v), step, scale=torch.tensor(0.37))
    assert not any(tensor.any() for tensor in (weight, residual, m, v))
    assert not weight.view(torch.int16).any(), "of positive sign"


def test_chunks_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grads = torch.randn(7, 33), gradients((7, 33))
    whole = run(weight, grads)
    monkeypatch.setattr(module, "_CHUNK", 50)
    assert all(torch.equal(a, b) for a, b in zip(run(weight, grads), whole, strict=True))
