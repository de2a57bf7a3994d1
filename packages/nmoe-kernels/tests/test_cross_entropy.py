"""Chunked linear cross-entropy against PyTorch's on whole logits in float64, and what it never allocates."""

import pytest
import torch
import torch.nn.functional as F
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference import cross_entropy
from nmoe.kernels.reference.cross_entropy import linear_cross_entropy

ROWS, WIDTH, VOCAB = 13, 6, 11
CHUNKS = {"one": 1 << 28, "two_rows": 3 * VOCAB, "one_row": 1}
"""Logits at once: all rows; as many as two rows (a power of two) need, and a last chunk of one; row by row."""


@pytest.fixture(params=CHUNKS)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", CHUNKS[request.param])


def draw(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, head and targets; rows 0, 5, 6 and the last are ignored."""
    target = torch.randint(VOCAB, (ROWS,))
    target[[0, 5, 6, ROWS - 1]] = -100
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), target


def exact(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, and the gradients of `scale` times it, over whole logits in float64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    loss = F.cross_entropy(x @ weight.t(), target, ignore_index=-100, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.usefixtures("chunked")
def test_value_and_gradients_equal_plain_cross_entropy() -> None:
    x, weight, target = draw()
    loss = linear_cross_entropy(x, weight, target)
    (loss * 0.3).backward()
    expected = exact(x, weight, target, 0.3)
    for a, b in zip((loss.detach(), x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not x.grad[[0, 5, 6, ROWS - 1]].any(), "ignored rows take no gradient"


@pytest.mark.usefixtures("chunked")
def test_gradients_by_finite_differences() -> None:
    x, weight, target = draw()
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, target), (x, weight))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, w, t: exact(x, w, t.clamp_min(0))[0],  # ignored rows scored as token 0
        lambda x, w, t: exact(x, w, t.roll(1))[0],  # off by one row
        lambda x, w, t: exact(x, w, t)[0] / (t != -100).sum(),  # mean
        lambda x, w, t: exact(x, w[:-1], t.clamp_max(VOCAB - 2))[0],  # a vocabulary row forgotten
    ],
    ids=["ignored_scored", "shifted", "mean", "short_vocabulary"],
)
def test_the_oracle_tells_mistakes_apart(mistake) -> None:
    x, weight, target = draw()
    assert (mistake(x, weight, target) - linear_cross_entropy(x, weight, target)).abs() > 1e-2


@pytest.mark.usefixtures("chunked")
def test_bfloat16_rows_are_scored_in_float32() -> None:
    """The loss has fp32's precision: logits rounded to bf16 would err by up to 2^-8 of a logit a row."""
    x, weight, target = draw(torch.bfloat16)
    loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    value, dx, dweight = exact(x, weight, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), value, rtol=2e-6, atol=0)
    # softmax - onehot is rounded to bf16 once before its products, the products once after.
    for found, expected in ((x.grad, dx), (weight.grad, dweight)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("chunked")
def test_main_grad_is_added_to_and_autograd_gets_nothing() -> None:
    x, weight, target = draw()
    before = torch.randn_like(weight)
    weight.main_grad = before.clone()
    for _ in range(2):
        linear_cross_entropy(x, weight, target).backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, before + 2 * exact(x, weight, target)[2], rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("chunked")
def test_a_stale_main_grad_is_overwritten_once() -> None:
    x, weight, target = draw()
    weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    for times in (1, 2):
        linear_cross_entropy(x, weight, target).backward()
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, times * exact(x, weight, target)[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("main_grad", [False, True])
def test_a_graph_that_is_kept_gives_its_gradients_again(main_grad: bool) -> None:
    """Each with its own factor: what the forward formed is not scaled in place."""
    x, weight, target = draw()
    if main_grad:
        weight.main_grad = torch.zeros_like(weight)
    loss = linear_cross_entropy(x, weight, target)
    for factor in (0.3, 7.0):
        (loss * factor).backward(retain_graph=True)
    _, dx, dweight = exact(x, weight, target, 7.3)
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weight.main_grad if main_grad else weight.grad, dweight, rtol=1e-12, atol=1e-13)


def test_the_factor_of_a_gradient_is_not_rounded_to_bfloat16() -> None:
    """It is one over the tokens of a batch: rounded, every gradient would be off by the same 2^-10 of itself."""
    x, weight, target = draw(torch.bfloat16)
    loss = linear_cross_entropy(x, weight, target)
    factor = torch.tensor(1 + 2.0**-8 - 2.0**-10)  # to bf16: 1
    (whole,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, x, factor)
    assert torch.equal(scaled, (whole.float() * factor).bfloat16())
    assert not torch.equal(scaled, whole)


def test_a_gradient_reaches_main_grad_in_one_pass(allocations) -> None:
    """No scaled copy of (V, D): the one tensor of that shape which an op gives is the accumulator."""
    x, weight, target = draw()
    weight.main_grad = torch.zeros_like(weight)
    loss = linear_cross_entropy(x, weight, target)
    with allocations:
        (loss * 0.3).backward()
    assert allocations.shapes.count((VOCAB, WIDTH)) == 1


def test_a_gradients_gradient_is_refused() -> None:
    x, weight, target = draw()
    loss = linear_cross_entropy(x, weight, target)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(loss, x, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_no_rows() -> None:
    """A stale main_grad becomes zeros, which is the gradient of nothing."""
    x, weight, _ = draw()
    weight.main_grad, weight.main_grad_stale = torch.full_like(weight, float("nan")), True
    loss = linear_cross_entropy(x[:0], weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert not weight.main_grad.any()


@pytest.mark.parametrize("where", ["x", "weight"])
def test_a_nan_is_not_hidden(where: str) -> None:
    x, weight, target = draw()
    with torch.no_grad():
        (x if where == "x" else weight)[3, 2] = float("nan")
    assert linear_cross_entropy(x, weight, target).isnan()


def test_float32_main_grad_of_bfloat16_head() -> None:
    """256 equal micro-batches: in bf16 the sum would stop growing."""
    x, weight, target = draw(torch.bfloat16)
    weight.main_grad = torch.zeros(weight.shape)
    for _ in range(256):
        linear_cross_entropy(x, weight, target).backward()
    torch.testing.assert_close(
        weight.main_grad.double(), 256 * exact(x, weight, target)[2], rtol=2**-8, atol=256 * 2**-8
    )


def test_extreme_logits_stay_finite() -> None:
    x = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_all_rows_ignored() -> None:
    x, weight, _ = draw()
    loss = linear_cross_entropy(x, weight, torch.full((ROWS,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch, allocations) -> None:
    rows, vocab, width, chunk = 512, 1000, 8, 16 * 1000
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(vocab, (rows,))
    with allocations:
        linear_cross_entropy(x, weight, target).backward()
    assert allocations.largest == chunk, f"{rows}×{vocab} logits in chunks of 16 rows"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_scoring_forms_no_gradients(allocations, mode) -> None:
    """Validation pays one product a chunk, not three, and no (V, D) accumulator."""
    x, weight, target = draw()
    with mode(), allocations:
        found = linear_cross_entropy(x, weight, target)
    assert sum(".mm." in op or ".addmm" in op or ".matmul." in op for op in allocations.ops) == 1
    assert all(shape != (VOCAB, WIDTH) for shape in allocations.shapes)
    torch.testing.assert_close(found, exact(x, weight, target)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_gradient_without_the_other(frozen: str) -> None:
    x, weight, target = draw()
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, target).backward()
    _, dx, dweight = exact(x, weight, target)
    found, expected = (weight.grad, dweight) if frozen == "x" else (x.grad, dx)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (x.grad if frozen == "x" else weight.grad) is None


@pytest.mark.parametrize(
    ("x", "weight", "target"),
    [((3, 4), (7, 5), (3,)), ((3, 4), (7, 4), (2,)), ((1, 3, 4), (7, 4), (1, 3))],
    ids=["width", "rows", "rank"],
)
def test_refuses_what_does_not_belong_together(x, weight, target) -> None:
    with pytest.raises(ShapeError, match=r"expected .* found"):
        linear_cross_entropy(torch.zeros(x), torch.zeros(weight), torch.zeros(target, dtype=torch.int64))
