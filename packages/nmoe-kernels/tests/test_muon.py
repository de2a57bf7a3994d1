"""Muon's passes over memory: the reference against float64; in CUDA, on a GPU (`-m gpu`), bit for bit the reference."""

from functools import partial
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.master import join_master, split_master
from nmoe.kernels.reference.muon import muon_apply_, muon_momentum_
from torch._subclasses.fake_tensor import FakeTensorMode

BETA = 0.95
OK, NOT_OK = (torch.tensor(word, dtype=torch.int32) for word in (1, 0))
SCALE = torch.tensor(0.37)
SCALARS = torch.tensor([0.99, 0.02])


def test_momentum_is_nesterovs() -> None:
    """torch.optim.Muon's: buf.lerp_(grad, 1 - beta), then grad.lerp(buf, beta)."""
    grad, momentum = torch.randn(2, 3, 50, dtype=torch.float64)
    before = momentum.clone()
    ahead = muon_momentum_(grad, momentum, SCALE.double(), OK, beta=BETA)
    expected = BETA * before + (1 - BETA) * grad * SCALE.double()
    torch.testing.assert_close(momentum, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(ahead, BETA * expected + (1 - BETA) * grad * SCALE.double(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("wrong", [{"beta": 0.9}, {"scale": 1.0}, {"nesterov": False}])
def test_the_momentum_oracle_tells_mistakes_apart(wrong: dict[str, Any]) -> None:
    grad, momentum = torch.randn(2, 50, dtype=torch.float64)
    scaled = grad * wrong.get("scale", 0.37)
    beta = wrong.get("beta", BETA)
    moved = beta * momentum + (1 - beta) * scaled
    expected = beta * moved + (1 - beta) * scaled if wrong.get("nesterov", True) else moved
    assert not torch.allclose(muon_momentum_(grad, momentum, SCALE.double(), OK, beta=BETA), expected, rtol=1e-3)


@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
def test_apply_is_decay_and_update_on_the_master(split: bool) -> None:
    master, update = torch.randn(3, 40), torch.randn(3, 40)
    weight, residual = split_master(master) if split else (master.clone(), None)
    muon_apply_(weight, residual, update, OK, SCALARS)
    found = weight if residual is None else join_master(weight, residual)
    expected = master.double() * SCALARS[0].double() - update.double() * SCALARS[1].double()
    assert ((found - expected).abs() <= 3 * 2.0**-24 * (master.abs() + update.abs())).all()


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_without_ok_every_bit_stays(value: float) -> None:
    momentum, kept = (torch.arange(20.0) for _ in range(2))
    muon_momentum_(torch.full((20,), value), momentum, SCALE, NOT_OK, beta=BETA)
    assert torch.equal(momentum, kept)
    weight, residual = split_master(torch.randn(20))
    before = weight.clone(), residual.clone()
    muon_apply_(weight, residual, torch.full((20,), value), NOT_OK, SCALARS)
    assert torch.equal(weight, before[0])
    assert torch.equal(residual, before[1])


# --- in CUDA ---------------------------------------------------------------------------------------------------------

native = pytest.importorskip("nmoe.kernels.native.muon_cuda", reason="the CUDA kernels are for Linux")
cuda = partial(torch.empty, device="cuda")
bf16, int16, int32 = (partial(cuda, dtype=dtype) for dtype in (torch.bfloat16, torch.int16, torch.int32))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: native.muon_momentum_(bf16(8), cuda(8), cuda(()), int32(()), beta=BETA), "grad.*found.*bfloat16"),
        (lambda: native.muon_momentum_(cuda(8), cuda(9), cuda(()), int32(()), beta=BETA), r"momentum of 8.*\(9,\)"),
        (lambda: native.muon_momentum_(cuda(8), cuda(8), cuda(()), cuda(()), beta=BETA), "ok of 1.*found.*float32"),
        (lambda: native.muon_apply_(cuda(8), None, bf16(8), int32(()), cuda(2)), "a residual.*found none"),
        (lambda: native.muon_apply_(bf16(8), int16(8), cuda(8), int32(()), cuda(2)), "update.*found.*float32"),
        (lambda: native.muon_apply_(bf16(8), int16(8), bf16(8), int32(()), cuda(3)), r"scalars of 2.*\(3,\)"),
        (lambda: native.muon_apply_(bf16(16)[::2], int16(8), bf16(8), int32(()), cuda(2)), "weight.*found.*strided"),
    ],
)
def test_refusals(call: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 3, 4, 5, 2047, 2048, 2049, 100_003])
def test_bits_are_the_references_on_the_gpu(gpu: str, n: int) -> None:
    size = 10.0 ** torch.randint(-9, 3, (n,))
    grad, momentum = (torch.randn(n) * size).to(gpu), (torch.randn(n) * size).to(gpu)
    weight, residual = (tensor.to(gpu) for tensor in split_master(torch.randn(n)))
    scale, ok, scalars = (word.to(gpu) for word in (SCALE, OK, SCALARS))
    ours, theirs = momentum.clone(), momentum.clone()
    ahead = native.muon_momentum_(grad, ours, scale, ok, beta=BETA)
    assert torch.equal(ahead, muon_momentum_(grad, theirs, scale, ok, beta=BETA))
    assert torch.equal(ours, theirs)
    mine, other = [weight.clone(), residual.clone()], [weight.clone(), residual.clone()]
    native.muon_apply_(*mine, ahead, ok, scalars)
    muon_apply_(*other, ahead, ok, scalars)
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert not torch.equal(mine[1], residual)


@pytest.mark.gpu
def test_without_ok_every_bit_stays_on_the_gpu(gpu: str) -> None:
    n = 5001
    nan = torch.full((n,), torch.nan, device=gpu)
    momentum, not_ok = torch.randn(n, device=gpu), NOT_OK.to(gpu)
    weight, residual = (tensor.to(gpu) for tensor in split_master(torch.randn(n)))
    state = momentum, weight, residual
    kept = [tensor.clone() for tensor in state]
    native.muon_momentum_(nan, momentum, nan[0], not_ok, beta=BETA)
    native.muon_apply_(weight, residual, nan.bfloat16(), not_ok, SCALARS.to(gpu))
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@pytest.mark.gpu
def test_nothing_beyond_the_parameter_is_touched(gpu: str) -> None:
    n = 2051
    grad, momentum = torch.randn(n + 9, device=gpu), torch.randn(n + 9, device=gpu)
    weight, residual = (tensor.to(gpu) for tensor in split_master(torch.randn(n + 9)))
    state = momentum, weight, residual
    kept = [tensor[n:].clone() for tensor in state]
    ahead = native.muon_momentum_(grad[:n], momentum[:n], SCALE.to(gpu), OK.to(gpu), beta=BETA)
    native.muon_apply_(weight[:n], residual[:n], ahead, OK.to(gpu), SCALARS.to(gpu))
    assert all(torch.equal(tensor[n:], old) for tensor, old in zip(state, kept, strict=True))
