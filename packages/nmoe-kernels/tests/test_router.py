"""The router's logits against plain products in float64: without a GPU, and by bf16 parts on the CPU and on one."""

from typing import Any

import pytest
import torch
from nmoe.kernels import router
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.router import router_logits, router_logits_and_tokens
from torch._subclasses.fake_tensor import FakeTensorMode

ULP = 2.0**-24
"""Half a unit in fp32's last place, relative."""
BF16 = 2.0**-8

SHAPES = [(1, 8, 3), (77, 64, 16), (300, 576, 64), (128, 2048, 5)]
"""T, D and E."""


def path(name: str) -> Any:
    """A parameter of `by_parts` and `anywhere`."""
    return pytest.param(name, marks=pytest.mark.gpu if name.startswith("cuda") else ())


def take(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sets up one of the paths by parts; returns its device."""
    if name != "cuda":
        monkeypatch.setattr(router, "_in_one_pass", lambda x: False)
    if name != "cpu":
        return "cuda"
    monkeypatch.setattr(router, "_splits", lambda x, weight: x.dtype == torch.bfloat16)
    monkeypatch.setattr(router, "_split", split_on_the_cpu)
    monkeypatch.setattr(router, "_added_to", added_on_the_cpu)
    return "cpu"


@pytest.fixture(params=[path("cpu"), path("cuda"), path("cuda_without_one_pass")])
def by_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device where fp32 weights are split: a GPU, by the path that it takes of itself or part by part; or the CPU,
    which has no need to and no kernels for it, and gets some here."""
    return take(request.param, monkeypatch)


@pytest.fixture(params=[path("plain"), path("cpu"), path("cuda")])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device, as `by_parts`, or the CPU with plain products."""
    return "cpu" if request.param == "plain" else take(request.param, monkeypatch)


def split_on_the_cpu(wide: torch.Tensor, n: int) -> torch.Tensor:
    parts = []
    for _ in range(n):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1]
    return torch.stack(parts, 1)


def added_on_the_cpu(addend: torch.Tensor, parts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    assert all(tensor.is_contiguous() for tensor in (addend, parts, weight))
    return (addend.float() + parts[:, 0].float() @ weight.float()).bfloat16()


def without_part(monkeypatch: pytest.MonkeyPatch, number: int, of: int) -> None:
    """Loses one part, from 0, of every split into `of`: 3 is a weight's, 2 a gradient's."""
    right = router._split

    def split(wide: torch.Tensor, n: Any) -> torch.Tensor:
        parts = right(wide, n)
        if n == of:
            parts[:, number] = 0
        return parts

    monkeypatch.setattr(router, "_split", split)


def draw(n_tokens: int, width: int, n_experts: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 tokens and an fp32 weight, of random numbers from the CPU."""
    x, weight = torch.randn(n_tokens, width).bfloat16(), torch.randn(n_experts, width) * width**-0.5
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_()


def exact(x: torch.Tensor, weight: torch.Tensor, dlogits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits and the gradients of x and weight, in float64 on the CPU."""
    x, weight, dlogits = (tensor.detach().double().cpu() for tensor in (x, weight, dlogits))
    return x @ weight.T, dlogits @ weight, dlogits.T @ x


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm."""
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), SHAPES)
def test_equals_the_plain_product(n_tokens: int, width: int, n_experts: int, dtype: torch.dtype) -> None:
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in draw(n_tokens, width, n_experts))
    found = router_logits(x, weight)
    dlogits = torch.randn_like(found)
    found.backward(dlogits)
    tolerance = (1e-6 if dtype == torch.float32 else 1e-15) * width**0.5
    for a, b in zip((found, x.grad, weight.grad), exact(x, weight, dlogits), strict=True):
        assert a.dtype == dtype
        assert error(a, b) < tolerance


def test_gradients_by_finite_differences() -> None:
    x, weight = (tensor.detach().double().requires_grad_() for tensor in draw(5, 7, 4))
    assert torch.autograd.gradcheck(router_logits, (x, weight))
    # Where both are used on beside it, and the weight twice.
    assert torch.autograd.gradcheck(
        lambda x, weight: (router_logits(x, weight).sin() @ weight * x, router_logits(x.cos(), weight)), (x, weight)
    )


def test_bfloat16_tokens_meet_a_float32_weight_on_the_cpu() -> None:
    """Logits and the weight's gradient in fp32; x's is rounded once."""
    x, weight = draw(77, 64, 16)
    found = router_logits(x, weight)
    dlogits = torch.randn_like(found)
    found.backward(dlogits)
    logits, dx, dweight = exact(x, weight, dlogits)
    assert (found.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert error(found, logits) < 1e-6
    assert error(weight.grad, dweight) < 1e-6
    assert error(x.grad, dx) < BF16


@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), SHAPES)
def test_parts_have_float32s_precision(by_parts: str, n_tokens: int, width: int, n_experts: int) -> None:
    """The error is that of fp32 sums, whatever their order; bf16 logits would err by hundreds of times as much."""
    x, weight = draw(n_tokens, width, n_experts, by_parts)
    found = router_logits(x, weight)
    assert (found.shape, found.dtype) == ((n_tokens, n_experts), torch.float32)
    logits, *_ = exact(x, weight, found)
    assert error(found, logits) < 8 * ULP * width**0.5
    assert error(found.bfloat16(), logits) > 20 * ULP * width**0.5


def cancelling(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of ±1 over pairs of columns, whose weights differ in their second and third parts alone, or their third:
    sums of the first parts cancel. Each part's sums are exact in fp32 in any order, and so are the logits."""
    width, n_experts = 256, 16
    sign = 1.0 - 2.0 * torch.randint(2, (40, width // 2))
    x = torch.stack((sign, -sign), -1).flatten(1)
    third = torch.randint(1, 128, (n_experts, width)) * 2.0**-23
    second = torch.randint(0, 2, (n_experts, width // 2)) * 2.0**-9
    second = torch.stack((second, second), -1).flatten(1)
    second[: n_experts // 2, ::2] += 2.0**-10
    return x.bfloat16().to(device), (1.0 + second + third).to(device)


def test_parts_are_exact_where_sums_are(by_parts: str) -> None:
    x, weight = cancelling(by_parts)
    logits, *_ = exact(x, weight, torch.zeros(40, 16))
    assert (logits != 0).float().mean() > 0.9
    assert torch.equal(router_logits(x, weight).double().cpu(), logits)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "third"])
def test_a_lost_part_of_the_weight_is_seen(by_parts: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = cancelling(by_parts)
    logits, *_ = exact(x, weight, torch.zeros(40, 16))
    without_part(monkeypatch, number, of=3)
    found = router_logits(x, weight).double().cpu()
    if number == 0:  # cancels here by design
        x, weight = draw(77, 64, 16, by_parts)
        found, logits = router_logits(x, weight), exact(x, weight, torch.zeros(77, 16))[0]
    assert error(found, logits) > 1e-3


@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), SHAPES[1:])
@pytest.mark.parametrize("lost", [False, True], ids=["whole", "without_lower_part"])
def test_gradients_by_parts(
    by_parts: str, n_tokens: int, width: int, n_experts: int, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight's, of two parts of the logits' gradient, errs by 2^-17 and fp32's sums: one part would err by bf16's
    rounding. x's, which ends in bf16, within two of its roundings."""
    x, weight = draw(n_tokens, width, n_experts, by_parts)
    found = router_logits(x, weight)
    dlogits = torch.randn(n_tokens, n_experts).to(by_parts)
    if lost:
        without_part(monkeypatch, 1, of=2)
    found.backward(dlogits)
    _, dx, dweight = exact(x, weight, dlogits)
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert error(x.grad, dx) < 2 * BF16
    assert (error(weight.grad, dweight) < 2.0**-17 + 8 * ULP * n_tokens**0.5) is not lost


@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), SHAPES[1:])
def test_gradient_of_tokens_that_others_use_too(by_parts: str, n_tokens: int, width: int, n_experts: int) -> None:
    """The sum of both uses' gradients, within three bf16 roundings; each share is larger than that."""
    x, weight = draw(n_tokens, width, n_experts, by_parts)
    own, other = torch.randn(n_tokens, n_experts).to(by_parts), torch.randn(n_tokens, width).bfloat16().to(by_parts)
    torch.autograd.backward((router_logits(x, weight), x * 1), (own, other))
    _, dx, dweight = exact(x, weight, own)
    whole = dx + other.double().cpu()
    assert error(x.grad, whole) < 3 * BF16
    assert error(dx, whole) > 3 * BF16
    assert error(other, whole) > 3 * BF16
    assert error(weight.grad, dweight) < 2.0**-17 + 8 * ULP * n_tokens**0.5


def test_an_expanded_or_transposed_gradient(by_parts: str) -> None:
    """What `.sum()` hands back has strides of 0, and a use of logits.T gives one by columns."""
    x, weight = draw(77, 64, 16, by_parts)
    by_columns = torch.randn(16, 77).to(by_parts).t()
    for dlogits in (torch.ones((), device=by_parts).expand(77, 16), by_columns):
        found = torch.autograd.grad(router_logits(x, weight), (x, weight), dlogits)
        dense = torch.autograd.grad(router_logits(x, weight), (x, weight), dlogits.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
        _, dx, dweight = exact(x, weight, dlogits)
        assert error(found[0], dx) < 2 * BF16
        assert error(found[1], dweight) < 2.0**-17 + 8 * ULP * 77**0.5


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_input_gets_nothing(by_parts: str, frozen: str) -> None:
    """And the other one its gradient's bits. A frozen weight's main_grad stays as it is, and stale."""
    x, weight = draw(77, 64, 16, by_parts)
    dlogits = torch.randn(77, 16).to(by_parts)
    dx, dweight = torch.autograd.grad(router_logits(x, weight), (x, weight), dlogits)
    (x if frozen == "x" else weight).requires_grad_(False)
    if frozen == "weight":
        weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    router_logits(x, weight).backward(dlogits)
    if frozen == "x":
        assert x.grad is None
        assert torch.equal(weight.grad, dweight)
    else:
        assert torch.equal(x.grad, dx)
        assert weight.grad is None
        assert weight.main_grad.isnan().all()
        assert weight.main_grad_stale


def test_a_gradients_gradient_is_refused() -> None:
    """The backward is derived by hand, once: silence would be a wrong second derivative."""
    x, weight = draw(5, 8, 4)
    dlogits = torch.randn(5, 4, requires_grad=True)
    dx, _ = torch.autograd.grad(router_logits(x, weight), (x, weight), dlogits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.float().sum().backward()


def test_a_wrong_main_grad_is_refused(by_parts: str) -> None:
    x, weight = draw(77, 64, 16, by_parts)
    weight.main_grad, weight.main_grad_stale = torch.zeros(64, 16, device=by_parts), True
    with pytest.raises(ShapeError, match=r"main_grad \(16, 64\).*found \(64, 16\)"):
        router_logits(x, weight).backward(torch.randn(77, 16).to(by_parts))
    assert not weight.main_grad.any()
    assert weight.main_grad_stale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_main_grad_is_overwritten_once_and_then_added_to(by_parts: str, dtype: torch.dtype) -> None:
    x, weight = draw(77, 64, 16, by_parts)
    x = x.detach().to(dtype).requires_grad_()
    weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    dlogits = torch.randn(77, 16).to(by_parts)
    for times in (1, 2, 3):
        router_logits(x, weight).backward(dlogits)
        assert weight.grad is None
        assert error(weight.main_grad, times * exact(x, weight, dlogits)[2]) < 1e-4


def test_same_inputs_same_bits(by_parts: str) -> None:
    x, weight = draw(300, 576, 64, by_parts)
    dlogits = torch.randn(300, 64).to(by_parts)

    def once() -> tuple[torch.Tensor, ...]:
        logits = router_logits(x, weight)
        return logits, *torch.autograd.grad(logits, (x, weight), dlogits)

    first = once()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@pytest.mark.parametrize(
    ("arch", "shape", "skipped", "expected"),
    [
        ("sm_90a", (5, 16), 0, True),
        ("sm_90a", (5, 8), 8, True),
        ("sm_90a", (0, 16), 0, True),
        ("sm_90a", (5, 16), 4, False),
        ("sm_90a", (5, 12), 0, False),
        ("sm_90a", (5, 0), 0, False),
        ("sm_100a", (5, 16), 0, False),
    ],
    ids=["fits", "later", "no_tokens", "between_16_bytes", "width_12", "no_width", "blackwell"],
)
def test_what_goes_in_one_pass(
    arch: str, shape: tuple[int, int], skipped: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a kernel, and TMA can read x."""
    monkeypatch.setattr(router, "_arch", lambda device: arch)
    x = torch.zeros(skipped + 80, dtype=torch.bfloat16)[skipped:][: shape[0] * shape[1]].view(shape)
    assert router._in_one_pass(x) is expected


@pytest.mark.parametrize(
    ("whole", "view"),
    [
        ((40, 77), lambda whole: whole.t()),
        ((77, 80), lambda whole: whole[:, ::2]),
        ((77 * 40 + 4,), lambda whole: whole[4:].view(77, 40)),
        ((77, 12), lambda whole: whole),
    ],
    ids=["transposed", "every_other", "between_16_bytes", "width_12"],
)
def test_tokens_that_lie_otherwise(by_parts: str, whole: tuple[int, ...], view: Any) -> None:
    """Logits and gradients come to the same, to their precision."""
    x = view(torch.randn(whole).bfloat16().to(by_parts)).requires_grad_()
    _, weight = draw(1, x.shape[1], 16, by_parts)
    dlogits = torch.randn(77, 16).to(by_parts)
    found = router_logits(x, weight)
    logits, dx, dweight = exact(x, weight, dlogits)
    assert error(found, logits) < 8 * ULP * x.shape[1] ** 0.5
    of_x, of_weight = torch.autograd.grad(found, (x, weight), dlogits)
    assert error(of_x, dx) < 2 * BF16
    assert error(of_weight, dweight) < 2.0**-17 + 8 * ULP * 77**0.5


# With the tokens, for what reads them beside the router.


@pytest.mark.parametrize(("n_tokens", "width", "n_experts"), SHAPES)
def test_the_tokens_gradient_is_where_the_routers_starts(
    anywhere: str, n_tokens: int, width: int, n_experts: int
) -> None:
    """Their sum, within one bf16 rounding of each element and fp32's; by parts, of operands that are bf16 first. Logits
    and the weight's gradient have the bits that they have alone."""
    x, weight = draw(n_tokens, width, n_experts, anywhere)
    dlogits = torch.randn(n_tokens, n_experts).to(anywhere)
    addend = torch.randn(n_tokens, width).bfloat16().to(anywhere)
    alone = router_logits(x, weight)
    logits, tokens = router_logits_and_tokens(x, weight)
    assert torch.equal(logits, alone)
    assert torch.equal(tokens, x)
    assert tokens.data_ptr() == x.data_ptr()
    dx, dweight = torch.autograd.grad((logits, tokens), (x, weight), (dlogits, addend))
    assert torch.equal(dweight, torch.autograd.grad(alone, weight, dlogits)[0])
    operands = [dlogits, weight.detach()]
    if router._splits(x, weight):
        operands = [operand.bfloat16() for operand in operands]
    g, w, a = (tensor.double().cpu() for tensor in (*operands, addend))
    assert dx.dtype == torch.bfloat16
    bound = BF16 * (a + g @ w).abs() + (n_experts + 1) * 2.0**-22 * (a.abs() + g.abs() @ w.abs())
    assert ((dx.double().cpu() - (a + g @ w)).abs() <= bound).all()


def test_the_sum_is_rounded_once(anywhere: str) -> None:
    """1 + 2^-8 + 2^-16 is above the middle between 1 and the next bf16, 1 + 2^-7; with the router's share rounded
    first, to 2^-8, it would be the middle itself, which goes to 1."""
    x = torch.ones(20, 16, dtype=torch.bfloat16, device=anywhere, requires_grad=True)
    weight = torch.tensor([[2.0**-8], [2.0**-16]], device=anywhere).repeat(1, 16)
    dlogits, addend = torch.ones(20, 2, device=anywhere), torch.ones_like(x)
    (dx,) = torch.autograd.grad(router_logits_and_tokens(x, weight), x, (dlogits, addend))
    (share,) = torch.autograd.grad(router_logits(x, weight), x, dlogits)
    assert (dx == 1 + 2.0**-7).all()
    assert (addend + share == 1).all()


@pytest.mark.parametrize(
    "lay",
    [
        lambda dense: dense.mean().expand(77, 64),
        lambda dense: dense[:1].expand(77, 64),
        lambda dense: dense.t().contiguous().t(),
    ],
    ids=["one_number", "one_row", "by_columns"],
)
def test_an_addend_that_lies_otherwise(anywhere: str, lay: Any) -> None:
    """Has the dense one's results; and what a gradient of `.sum()` is, one number in memory, stays one."""
    x, weight = draw(77, 64, 16, anywhere)
    dlogits, addend = torch.randn(77, 16).to(anywhere), lay(torch.randn(77, 64).bfloat16().to(anywhere))
    before = addend.clone()
    found, dense = (
        torch.autograd.grad(router_logits_and_tokens(x, weight), (x, weight), (dlogits, given))
        for given in (addend, addend.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))
    assert torch.equal(addend, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_addend_is_not_written_to(anywhere: str, dtype: torch.dtype) -> None:
    """A sum hands the same gradient to all its terms, and the caller keeps it."""
    x, weight = draw(77, 64, 16, anywhere)
    x = x.detach().to(dtype).requires_grad_()
    term = torch.zeros_like(x, requires_grad=True)
    dlogits, addend = torch.randn(77, 16).to(anywhere), torch.randn(77, 64).to(anywhere, dtype)
    before = addend.clone()
    logits, tokens = router_logits_and_tokens(x, weight)
    dx, dterm = torch.autograd.grad((logits, tokens + term), (x, term), (dlogits, addend))
    assert torch.equal(addend, before)
    assert torch.equal(dterm, before)
    assert not torch.equal(dx, before)


def test_tokens_alone_have_their_gradient_as_it_is(anywhere: str) -> None:
    """And the weight has none: its main_grad stays as it is, and stale."""
    x, weight = draw(77, 64, 16, anywhere)
    weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    addend = torch.randn(77, 64).bfloat16().to(anywhere)
    _, tokens = router_logits_and_tokens(x, weight)
    tokens.backward(addend)
    assert torch.equal(x.grad, addend)
    assert weight.grad is None
    assert weight.main_grad.isnan().all()
    assert weight.main_grad_stale


def test_logits_alone_have_the_gradients_of_router_logits(anywhere: str) -> None:
    x, weight = draw(77, 64, 16, anywhere)
    dlogits = torch.randn(77, 16).to(anywhere)
    found, alone = (
        torch.autograd.grad(logits, (x, weight), dlogits)
        for logits in (router_logits_and_tokens(x, weight)[0], router_logits(x, weight))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_frozen_tokens_ask_for_no_gradient(anywhere: str) -> None:
    """Or the experts would compute one for nothing."""
    x, weight = draw(77, 64, 16, anywhere)
    logits, tokens = router_logits_and_tokens(x.detach(), weight)
    assert not tokens.requires_grad
    dlogits = torch.randn(77, 16).to(anywhere)
    expected = torch.autograd.grad(router_logits(x, weight), weight, dlogits)[0]
    assert torch.equal(torch.autograd.grad(logits, weight, dlogits)[0], expected)
    with torch.no_grad():
        assert not any(result.requires_grad for result in router_logits_and_tokens(x, weight))


def test_a_frozen_weight_leaves_the_tokens_gradient(anywhere: str) -> None:
    x, weight = draw(77, 64, 16, anywhere)
    given = torch.randn(77, 16).to(anywhere), torch.randn(77, 64).bfloat16().to(anywhere)
    expected, found = (
        torch.autograd.grad(router_logits_and_tokens(x, w), x, given)[0] for w in (weight, weight.detach())
    )
    assert torch.equal(found, expected)


def test_gradients_with_tokens_by_finite_differences() -> None:
    """Of both results, of each without the other, and of several uses of the tokens."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in draw(5, 7, 4))
    assert torch.autograd.gradcheck(router_logits_and_tokens, (x, weight))

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits, tokens = router_logits_and_tokens(x.sin(), weight)
        return logits.softmax(-1) @ weight * tokens + tokens.cos()

    assert torch.autograd.gradcheck(layer, (x, weight))


def test_tokens_cannot_be_written_to_in_place() -> None:
    """The weight's gradient needs them as the router saw them."""
    _, tokens = router_logits_and_tokens(*draw(5, 8, 4))
    with pytest.raises(RuntimeError, match="inplace"):
        tokens.mul_(2)


@pytest.mark.parametrize(
    ("x", "weight"), [((3, 4), (7, 5)), ((2, 3, 4), (7, 4)), ((3, 4), (4,))], ids=["width", "x", "weight"]
)
def test_refuses_what_does_not_belong_together(x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    for call in (router_logits, router_logits_and_tokens):
        with pytest.raises(ShapeError, match=r"expected x \(T, D\) and weight \(E, D\), found .* give both"):
            call(torch.zeros(x), torch.zeros(weight))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_an_arch_without_kernels_has_the_plain_product(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs on any device: what kernels of this package would do there is left to PyTorch."""
    monkeypatch.setattr(router, "_arch", lambda device: arch)
    monkeypatch.delattr(router, "_split")
    monkeypatch.delattr(router, "_product")
    with FakeTensorMode():
        x = torch.empty(6, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(4, 16, device="cuda", requires_grad=True)
        logits, again = router.router_logits_and_tokens(x, weight)
        assert again.grad_fn is logits.grad_fn
        dx, dweight = logits.grad_fn.apply(torch.ones_like(logits), torch.ones_like(x))
    assert (logits.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
