"""Where weight gradients go: overwritten once where the trainer says so, added from then on."""

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.main_grad import claim, deliver


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(3, dtype=dtype))


def test_without_an_accumulator_autograd_gets_the_gradient_in_the_weights_dtype() -> None:
    w = weight()
    assert claim(w) is None
    found = deliver(w, torch.tensor([1.0, 2.0, 1.0 + 2**-12]))
    assert found is not None
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [1.0, 2.0, 1.0]
    assert not hasattr(w, "main_grad_stale"), "a plain weight gets no attribute"


@pytest.mark.parametrize("told", [True, False], ids=["told", "not_told"])
def test_a_fresh_accumulator_is_added_to(told: bool) -> None:
    w = weight()
    w.main_grad = torch.tensor([1.0, 2.0, 3.0])
    if told:
        w.main_grad_stale = False
    grad = torch.tensor([2.0**-12, 0.0, -3.0])
    assert deliver(w, grad) is None
    assert w.main_grad.tolist() == [1.0 + 2**-12, 2.0, 0.0], "in fp32"


@pytest.mark.parametrize("left", [float("nan"), float("inf"), 7.0])
def test_a_stale_accumulator_is_overwritten_once(left: float) -> None:
    w = weight()
    accumulator = torch.full((3,), left)
    w.main_grad, w.main_grad_stale = accumulator, True
    grads = torch.randn(3, 3)
    assert deliver(w, grads[0]) is None
    assert torch.equal(accumulator, grads[0])
    for grad in grads[1:]:
        deliver(w, grad)
    assert torch.equal(accumulator, grads[0] + grads[1] + grads[2])
    assert w.main_grad is accumulator, "the trainer's own memory"


def test_a_claim_says_once_to_overwrite() -> None:
    w = weight()
    w.main_grad, w.main_grad_stale = torch.zeros(3), True
    said = []
    for _ in range(3):
        claimed = claim(w)
        assert claimed is not None
        assert claimed[0] is w.main_grad
        said.append(claimed[1])
    assert said == [False, True, True]
    w.main_grad_stale = True
    claimed = claim(w)
    assert claimed is not None
    assert not claimed[1], "each step anew"


@pytest.mark.parametrize(
    ("accumulator", "found"),
    [
        (torch.zeros(4), r"found \(4,\) on cpu"),
        (torch.zeros(1), r"found \(1,\) on cpu"),
        (torch.zeros(()), r"found \(\) on cpu"),
        (torch.zeros(3, 1), r"found \(3, 1\) on cpu"),
        (torch.zeros(3, device="meta"), r"found \(3,\) on meta"),
    ],
    ids=["longer", "one", "scalar", "column", "device"],
)
@pytest.mark.parametrize("stale", [True, False], ids=["stale", "fresh"])
def test_an_accumulator_that_does_not_fit_is_refused(accumulator: torch.Tensor, found: str, stale: bool) -> None:
    """Broadcasting would add a gradient of another shape in silence. A refusal claims nothing."""
    w = weight()
    w.main_grad, w.main_grad_stale = accumulator, stale
    told = rf"expected a main_grad \(3,\) on cpu, {found}: allocate it with torch.empty_like"
    with pytest.raises(ShapeError, match=told):
        claim(w)
    with pytest.raises(ShapeError, match=told):
        deliver(w, torch.ones(3))
    assert w.main_grad_stale is stale
    assert accumulator.is_meta or not accumulator.any()
