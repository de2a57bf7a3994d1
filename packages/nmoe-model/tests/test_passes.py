"""How often the residual stream is gone over: each addition goes with a norm, and no gradients are added outside."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from nmoe.kernels.ops import Ops
from nmoe.kernels.reference.norm import rms_norm
from nmoe.model.transformer import Transformer
from torch.utils._python_dispatch import TorchDispatchMode


class Additions(TorchDispatchMode):
    """Counts additions that return a tensor of the residual stream's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.add.", "aten.add_.")):
            self.count += tuple(out.shape) == self.shape
        return out


class AddRMSNorm(torch.autograd.Function):
    """The op, as a kernel does it: without an addition of its own that the dispatcher would see."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
        total = x if delta is None else torch.addcmul(x, delta, torch.ones_like(x))
        ctx.save_for_backward(total, weight)
        ctx.has_delta, ctx.eps = delta is not None, eps
        return total, rms_norm(total, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            out = rms_norm(total, weight, ctx.eps)
        dx, dweight = torch.autograd.grad(out, (total, weight), grads[1])
        dx = torch.addcmul(dx, grads[0], torch.ones_like(dx))
        return dx, dx if ctx.has_delta else None, dweight, None


def one_after_the_other(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
    """What the op saves: its sum has two users."""
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


def additions(model: Transformer, add_rms_norm: Any) -> tuple[int, int]:
    """Of a step's forward and backward, with another op for addition and norm."""
    for module in model.modules():
        if isinstance(getattr(module, "ops", None), Ops):
            module.ops = replace(module.ops, add_rms_norm=add_rms_norm)
    tokens = torch.randint(model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    with Additions((3, 7, model.config.dim)) as counter:
        loss = model.training_loss(tokens, 21)
        forward = counter.count
        loss.total.backward()
    return forward, counter.count - forward


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_dense_model_adds_with_its_norms_alone(tiny, build, qk_norm: bool) -> None:
    """Neither residuals nor gradients: each tensor of the stream's size has one user."""
    model = build(tiny("sdpa", n_dense_layers=4, qk_norm=qk_norm))
    assert additions(model, AddRMSNorm.apply) == (0, 0)


def test_additions_beside_the_norms_are_counted(tiny, build) -> None:
    """Two a layer, and as many sums of two gradients."""
    model = build(tiny("sdpa", n_dense_layers=4))
    assert additions(model, one_after_the_other) == (8, 8)


@pytest.mark.parametrize("name", ["everything", "sdpa_swa_mtp"])
def test_the_op_changes_no_value(tiny, build, name: str) -> None:
    """In float64, against additions and norms one after the other."""
    model = build(tiny(name))
    tokens = torch.randint(model.config.vocab_size, (3, 8), generator=torch.Generator().manual_seed(0))
    results = []
    for op in (None, one_after_the_other):
        for module in model.modules():
            if op is not None and isinstance(getattr(module, "ops", None), Ops):
                module.ops = replace(module.ops, add_rms_norm=op)
        model.zero_grad()
        loss = model.training_loss(tokens, 21).total
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
