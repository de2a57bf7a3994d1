"""The native tier, and what both tiers share, on the GPU at hand, against float64 on the CPU (`-m gpu`)."""

import pytest
import torch
from nmoe.kernels.errors import UnsupportedArchError
from nmoe.kernels.experts import moe_experts
from nmoe.kernels.ops import Ops, select_ops
from nmoe.kernels.reference import cross_entropy
from nmoe.kernels.reference.adamw import AdamWStep
from nmoe.kernels.reference.adamw import adamw_ as reference_adamw_
from nmoe.kernels.reference.master import join_master, split_master
from nmoe.kernels.reference.routing import index_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, found none"),
]
ROUNDING = 2.0**-8
"""Of bf16, relative."""


@pytest.fixture
def native() -> Ops:
    try:
        return select_ops("native", "cuda")
    except UnsupportedArchError as error:
        pytest.skip(str(error))


def norm_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative; absolute (in hundredths) where the exact value is 0, as the gradient of a lone key's score is."""
    return float((found.detach().double().cpu() - exact).norm() / exact.norm().clamp_min(1e-2))


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    hidden = (distance < 0) | (distance >= (window or keys))
    return (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 64)])
@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [(256, 256, None), (77, 77, None), (1, 1, None), (300, 300, 64), (1, 77, None), (3, 77, 20)],
)
def test_attention(native: Ops, queries: int, keys: int, window: int | None, widths: tuple[int, int]) -> None:
    """Output and gradients within two bf16 roundings of the norm: probabilities and results are rounded once each, and
    the errors of a sum's terms are independent."""
    width, value = widths
    shapes = ((queries, width), (keys, width), (keys, value))
    inputs = [torch.randn(2, 4, n, w, device="cuda").bfloat16().requires_grad_() for n, w in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    scale = width**-0.5
    found = native.attention(*inputs, scale=scale, window=window)
    expected = naive_attention(*exact, scale=scale, window=window)
    dout = torch.randn_like(found)
    found.backward(dout)
    expected.backward(dout.double().cpu())
    assert norm_error(found, expected.detach()) < 2 * ROUNDING
    for a, b in zip(inputs, exact, strict=True):
        assert norm_error(a.grad, b.grad) < 2 * ROUNDING
    wrong = naive_attention(*(x.detach() for x in exact), scale=scale * 1.1, window=window)
    assert queries == 1 or norm_error(found, wrong) > 2 * ROUNDING


def offsets(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


RAGGED = [(100, 0, 1, 155), (0, 256, 0, 0), (0, 0, 200, 56), (64, 64, 64, 64)]


@pytest.mark.parametrize("sizes", RAGGED)
def test_grouped_gemm(native: Ops, sizes: tuple[int, ...]) -> None:
    a = torch.randn(256, 64, device="cuda").bfloat16()
    weight = torch.randn(4, 96, 64, device="cuda").bfloat16().transpose(1, 2)
    found = native.grouped_gemm(a, weight, offsets(*sizes))
    blocks = [x @ w for x, w in zip(a.double().cpu().split(sizes), weight.double().cpu(), strict=True)]
    assert norm_error(found, torch.cat(blocks)) < ROUNDING
    assert (found.double().cpu() - torch.cat(blocks)).abs().max() < 0.3, "no row apart from the others"


@pytest.mark.parametrize("sizes", RAGGED)
def test_grouped_wgrad_adds(native: Ops, sizes: tuple[int, ...]) -> None:
    a, b = (torch.randn(256, n, device="cuda").bfloat16() for n in (96, 64))
    into = torch.randn(4, 96, 64, device="cuda")
    before = into.double().cpu()
    native.grouped_wgrad(a, b, offsets(*sizes), into)
    pairs = zip(a.double().cpu().split(sizes), b.double().cpu().split(sizes), strict=True)
    expected = before + torch.stack([x.T @ y for x, y in pairs])
    assert norm_error(into, expected) < ROUNDING
    for expert, size in enumerate(sizes):
        assert size or torch.equal(into[expert].double().cpu(), before[expert]), "no rows, no change"


def test_reference_wgrad_rounds_no_product() -> None:
    """bf16 into fp32 on the device: 256 terms in fp32, unlike the native tier's, whose product is rounded to bf16."""
    a, b = (torch.randn(256, n, device="cuda").bfloat16() for n in (96, 64))
    into = torch.zeros(4, 96, 64, device="cuda")
    select_ops("reference", "cuda").grouped_wgrad(a, b, offsets(100, 0, 1, 155), into)
    sizes = (100, 0, 1, 155)
    pairs = zip(a.double().cpu().split(sizes), b.double().cpu().split(sizes), strict=True)
    assert norm_error(into, torch.stack([x.T @ y for x, y in pairs])) < 1e-5


def test_linear_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows in chunks: the loss in fp32's precision, gradients within two bf16 roundings."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 100 * 1000)
    x, weight = (torch.randn(n, 64, device="cuda").bfloat16() for n in (333, 1000))
    target = torch.randint(1000, (333,), device="cuda")
    target[::7] = -100
    exact = [tensor.double().cpu().requires_grad_() for tensor in (x, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target.cpu(), reduction="sum")
    expected.backward()
    x.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device="cuda")
    found = cross_entropy.linear_cross_entropy(x, weight, target)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert norm_error(x.grad, exact[0].grad) < 2 * ROUNDING
    assert norm_error(weight.main_grad, exact[1].grad) < 2 * ROUNDING


def test_moe_experts(native: Ops) -> None:
    """The whole op against the reference tier in float64: about six bf16 roundings lie on the longest way."""
    tokens, width, hidden, n_experts = 200, 64, 96, 6
    expert_TK = torch.rand(tokens, n_experts - 1).argsort(1)[:, :3].contiguous()  # the last expert has no rows
    exact = [
        torch.randn(tokens, width).bfloat16(),
        torch.rand(tokens, 3),
        (torch.randn(n_experts, 2, hidden, width) * width**-0.5).bfloat16(),
        (torch.randn(n_experts, width, hidden) * hidden**-0.5).bfloat16(),
    ]
    dout = torch.randn(tokens, width).bfloat16()
    found = [x.cuda().requires_grad_() for x in exact]
    exact = [x.double().requires_grad_() for x in exact]
    results = []
    for ops, (x, gate, w13, w2), grad in (
        (native, found, dout.cuda()),
        (select_ops("reference", "cpu"), exact, dout.double()),
    ):
        if ops is native:
            w13.main_grad, w2.main_grad = torch.zeros_like(w13).float(), torch.zeros_like(w2).float()
        index = index_rows(expert_TK.to(x.device), n_experts)
        results.append(moe_experts(ops, x, index, gate, w13, w2))
        results[-1].backward(grad)
    assert norm_error(results[0], results[1].detach()) < 6 * ROUNDING
    assert norm_error(found[0].grad, exact[0].grad) < 6 * ROUNDING
    assert norm_error(found[1].grad, exact[1].grad) < 6 * ROUNDING
    for a, b in zip(found[2:], exact[2:], strict=True):
        assert a.grad is None
        assert norm_error(a.main_grad, b.grad) < 6 * ROUNDING
        assert not a.main_grad[-1].any()


@pytest.mark.parametrize("n", [1, 4097, 1 << 20])
@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
def test_adamw(native: Ops, n: int, split: bool) -> None:
    """Three steps beside the reference on the CPU. Each operation may round differently by one unit of 2^-24, and the
    device's division by two: 32 units in all, of the weight or, where it is larger, of the update (at most lr · 10)."""
    master = torch.randn(n)
    ours = [torch.zeros(n) for _ in range(2)]
    theirs = [x.cuda() for x in ours]
    weight, residual = split_master(master) if split else (master.clone(), None)
    there = weight.cuda(), None if residual is None else residual.cuda()
    for step in range(1, 4):
        scalars = AdamWStep(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step)
        grad, scale = torch.randn(n) * 10.0 ** torch.randint(-9, 3, (n,)), torch.tensor(0.37)
        reference_adamw_(weight, residual, grad, *ours, scale, scalars)
        native.adamw_(*there, grad.cuda(), *theirs, scale.cuda(), scalars)
    found, expected = there[0].cpu(), weight
    if residual is not None:
        assert (found.view(torch.int16) != weight.view(torch.int16)).sum() <= 1 + n // 1000
        found, expected = join_master(found, there[1].cpu()), join_master(weight, residual)
    torch.testing.assert_close(found, expected, rtol=32 * 2**-24, atol=32 * 2**-24 * 3e-2)
    torch.testing.assert_close(theirs[1].cpu(), ours[1], rtol=16 * 2**-24, atol=0)
