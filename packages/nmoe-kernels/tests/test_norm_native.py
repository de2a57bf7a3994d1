"""The native RMSNorm, alone and after an addition: in Triton's interpreter against float64 without a GPU; on one, the
same with the CUDA backward (`-m gpu`)."""

from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
pytest.importorskip("triton", reason="Triton is for Linux")
from nmoe.kernels.native import norm as module
from nmoe.kernels.native import norm_backward_cuda, norm_triton

EPS = 1e-5
ROUNDING = 1.01 * 2.0**-8
"""Of bf16 to nearest, relative, and a little for fp32's own; the interpreter cuts off instead, which is twice that."""
FP32 = 1e-5
"""Some 160 roundings of fp32, of the terms: what a row's sum and its root have, and what follows from them."""

KINDS = {"alone": (), "through": ("dtotal",), "added": ("dtotal", "delta")}
"""What a case has besides: the op is `rms_norm`, or `add_rms_norm` with None or something to add."""

INTERPRETED = [(1, 1), (5, 7), (300, 64), (11, 768), (7, 2048), (2, 5000)]
CASES = {f"{rows}x{width}-{kind}": (rows, width, kind) for rows, width in INTERPRETED for kind in KINDS}

Tensors = dict[str, torch.Tensor]


def draw(rows: int, width: int, kind: str, device: str = "cpu") -> Tensors:
    """bf16; one row is all zeros, one large, where there are so many."""
    generator = torch.Generator(device).manual_seed(rows + width)
    given = {
        name: torch.randn(rows, width, generator=generator, device=device) for name in ("x", "dout", "dtotal", "delta")
    }
    if rows > 4:
        given["x"][1], given["delta"][1] = 0.0, 0.0
        given["x"][2] *= 1e4
    given["weight"] = 1 + 0.2 * torch.randn(width, generator=generator, device=device)
    return {name: given[name].bfloat16() for name in ("x", "dout", "weight", *KINDS[kind])}


def exact(given: Tensors, total: torch.Tensor | None = None, eps: float = EPS) -> tuple[Tensors, torch.Tensor]:
    """Results by autograd in float64, norm and gradients at the sum as it was rounded, where that is given; and the
    sizes of the terms that dx is summed of."""
    wide = {name: tensor.double() for name, tensor in given.items()}
    summed = wide["x"] + wide["delta"] if "delta" in wide else wide["x"]
    x, weight = (summed if total is None else total.double()).requires_grad_(), wide["weight"].requires_grad_()
    scale = 1 / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    out = x * scale * weight
    out.backward(wide["dout"])
    assert x.grad is not None
    assert weight.grad is not None
    gained, normed, scale = (wide["dout"] * weight).detach().abs(), (x * scale).detach().abs(), scale.detach()
    terms = scale * (gained + normed * (gained * normed).mean(-1, keepdim=True))
    dx = x.grad
    if "dtotal" in wide:
        dx, terms = dx + wide["dtotal"], terms + wide["dtotal"].abs()
    results = {"out": out.detach(), "dx": dx, "dweight": weight.grad}
    if "dtotal" in wide:
        results["total"] = summed.detach()
    if "delta" in wide:
        results["ddelta"] = dx
    return results, terms


def near(name: str, found: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, rounding: float) -> bool:
    """A rounding of each element, and fp32's error: of dx's terms, which may cancel; of the row's size in all else. The
    gain's gradient has no rounding."""
    size = terms if name in ("dx", "ddelta") else expected.abs().amax(-1, keepdim=True)
    rounding = 0.0 if name == "dweight" else rounding
    return bool(((found.double() - expected).abs() <= rounding * expected.abs() + FP32 * size + 1e-30).all())


def wrong_results(given: Tensors, found: Tensors, rounding: float = ROUNDING, eps: float = EPS) -> set[str]:
    """Those that are not near float64's, one of another shape among them."""
    expected, terms = exact(given, found.get("total"), eps)
    assert expected.keys() == found.keys()
    return {
        name
        for name, tensor in expected.items()
        if found[name].shape != tensor.shape or not near(name, found[name], tensor, terms, rounding)
    }


# --- without a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(interpret: Any) -> dict[str, Tensors]:
    """Results by case and name, from one run of the interpreter."""
    arrays = {
        case: {name: tensor.float().numpy() for name, tensor in draw(*what).items()} | {"eps": np.array(EPS)}
        for case, what in CASES.items()
    }
    results: dict[str, Tensors] = {case: {} for case in CASES}
    for key, array in interpret("norm_interpreted.py", arrays).items():
        case, name = key.split("/")
        results[case][name] = torch.from_numpy(array)
    return results


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, Tensors], name: str) -> None:
    assert wrong_results(draw(*CASES[name]), interpreted[name], 2 * ROUNDING) == set()


@pytest.mark.parametrize(
    ("change", "eps", "reached"),
    [
        (lambda c: {"dtotal": 0 * c["dtotal"]}, EPS, {"dx", "ddelta"}),
        (lambda c: {"dtotal": c["dtotal"].roll(1, 0)}, EPS, {"dx", "ddelta"}),
        (lambda c: {"delta": -c["delta"]}, EPS, {"total"}),
        (lambda c: {"dout": c["dout"].roll(1, 0)}, EPS, {"dx", "ddelta", "dweight"}),
        (lambda c: {"weight": torch.ones_like(c["weight"])}, EPS, {"out", "dx", "ddelta"}),
        (lambda c: {}, 0.1, {"out", "dx", "ddelta", "dweight"}),
    ],
    ids=["sum's gradient left out", "next row's", "subtracted", "next row's norm", "gain left out", "eps"],
)
def test_the_bounds_tell_other_inputs_apart(
    interpreted: dict[str, Tensors], change: Any, eps: float, reached: set[str]
) -> None:
    """The kernel's results against those of other inputs: exactly what these reach is refused."""
    given = draw(300, 64, "added")
    assert wrong_results(given | change(given), interpreted["300x64-added"], 2 * ROUNDING, eps) == reached


@pytest.mark.parametrize(
    ("mistake", "seen_in"),
    [("mean not removed", "out"), ("a row left out", "dweight"), ("row constant left out", "dx")],
)
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, Tensors], mistake: str, seen_in: str) -> None:
    given = draw(300, 64, "alone")
    expected, terms = exact(given)
    if mistake == "mean not removed":
        x = given["x"].double()
        expected, _ = exact(given | {"x": x - x.mean(-1, keepdim=True)})
    elif mistake == "a row left out":
        given["dout"][77] = 0
        expected, _ = exact(given)
    else:
        x = given["x"].double()
        gained = given["dout"].double() * given["weight"].double()
        expected = {"dx": gained / (x.square().mean(-1, keepdim=True) + EPS).sqrt()}
    assert not near(seen_in, interpreted["300x64-alone"][seen_in], expected[seen_in], terms, 2 * ROUNDING)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(4, 8), torch.zeros(8)),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(8)),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(7).bfloat16()),
        (torch.zeros(4, 8).bfloat16(), torch.zeros(16).bfloat16()[::2]),
        (torch.zeros(1, 16_385).bfloat16(), torch.zeros(16_385).bfloat16()),
        (torch.zeros(4, 8, device="meta").bfloat16(), torch.zeros(8).bfloat16()),
        (torch.zeros(()).bfloat16(), torch.zeros(8).bfloat16()),
    ],
    ids=["fp32", "weight", "width", "strided", "wide", "device", "scalar"],
)
def test_refuses(x: torch.Tensor, weight: torch.Tensor) -> None:
    for op in (module.rms_norm, lambda x, weight, eps: module.add_rms_norm(x, x, weight, eps)):
        with pytest.raises(ShapeError, match=r"expected x \(…, D\) and weight \(D\), torch.bfloat16 on one device"):
            op(x, weight, EPS)


@pytest.mark.parametrize("delta", [torch.zeros(4, 8), torch.zeros(3, 8).bfloat16(), torch.zeros(8).bfloat16()])
def test_refuses_to_add_something_else(delta: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"expected delta \(4, 8\) of torch.bfloat16 on cpu as x is, found"):
        module.add_rms_norm(torch.zeros(4, 8).bfloat16(), delta, torch.zeros(8).bfloat16(), EPS)


def test_a_sum_or_a_norm_that_leads_nowhere_costs_nothing(launches_of: Any) -> None:
    """No zeros are read for the gradient of the one, and without the other's no kernel runs."""
    forward, backward = (launches_of(norm_triton, name) for name in ("_norm_kernel", "_norm_backward_kernel"))
    x, delta = (torch.zeros(4, 64).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.ones(64).bfloat16().requires_grad_()
    dtotal = torch.randn(4, 64).bfloat16()
    total, _ = module.add_rms_norm(x, delta, weight, EPS)
    total.backward(dtotal)
    assert forward.grid
    assert backward.grid is None
    assert torch.equal(x.grad, dtotal)
    assert torch.equal(delta.grad, dtotal)
    assert weight.grad is None
    module.add_rms_norm(x, delta, weight, EPS)[1].backward(dtotal)
    assert backward.options["ADD"] is False
    assert all(torch.equal(argument, dtotal) for argument in backward.args[:2])


@pytest.mark.parametrize("by_cuda", [False, True])
def test_the_backward_is_the_one_that_takes_it(
    monkeypatch: pytest.MonkeyPatch, by_cuda: bool, launches_of: Any
) -> None:
    """And it gets dense gradients, and x's rows where they lie."""
    launches_of(norm_triton, "_norm_kernel")
    calls: dict[str, Any] = {}
    monkeypatch.setattr(norm_backward_cuda, "takes", lambda *tensors: calls.setdefault("takes", tensors) and by_cuda)
    for other in (norm_backward_cuda, norm_triton):
        name = other.__name__.rpartition(".")[2]
        monkeypatch.setattr(other, "backward", lambda *arguments, name=name: calls.setdefault(name, arguments) and None)
    x = torch.zeros(2, 3, 16).bfloat16()[..., :8].requires_grad_()
    weight = torch.ones(8).bfloat16().requires_grad_()
    module.rms_norm(x, weight, EPS).backward(torch.ones(8).bfloat16().expand(2, 3, 8))
    assert calls.keys() == {"takes", "norm_backward_cuda" if by_cuda else "norm_triton"}
    dout, dtotal, x_RD, scale_R, gain, dx, wants_dweight = calls.popitem()[1]
    assert dout.is_contiguous()
    assert dtotal is None
    assert (x_RD.shape, x_RD.stride(), x_RD.data_ptr()) == ((6, 8), (16, 1), x.data_ptr())
    assert scale_R.shape == (6,)
    assert gain is weight
    assert dx.shape == x.shape
    assert wants_dweight is True


# --- on a GPU --------------------------------------------------------------------------------------------------------

MOST = 16_384
# Each CUDA kernel's widest rows and some that leave it part idle; fewer rows than teams, and than stages.
BY_CUDA = [
    *((rows, 768) for rows in (1, 2, 15, 17, 133, 2113, 9001)),
    *((333, width) for width in (256, 264, 512, 520, 776, 1024, 1032, 2040, 2048, 2056, 4096, 4104, 8192)),
    (70, MOST - 8),
    (701, MOST),
    (65_537, 512),
]
BY_TRITON = [(1, 1), (5, 7), (300, 64), (200_003, 64), (11, 255), (9, 1001), (4, 250), (9001, 1020), (7, MOST - 1)]


def results_of(given: Tensors, before: float = 0.0) -> Tensors:
    """Outputs and gradients, the gain's in fp32; `before` is what stands in its accumulator."""
    x, weight = given["x"].detach().requires_grad_(), given["weight"].detach().requires_grad_()
    weight.main_grad = torch.full(weight.shape, before, device=weight.device)
    if "dtotal" not in given:
        out = module.rms_norm(x, weight, EPS)
        out.backward(given["dout"])
        return {"out": out.detach(), "dx": x.grad, "dweight": weight.main_grad}
    delta = given["delta"].detach().requires_grad_() if "delta" in given else None
    total, out = module.add_rms_norm(x, delta, weight, EPS)
    torch.autograd.backward((total, out), (given["dtotal"], given["dout"]))
    assert weight.grad is None
    results = {"total": total.detach(), "out": out.detach(), "dx": x.grad, "dweight": weight.main_grad}
    return results if delta is None else results | {"ddelta": delta.grad}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [*BY_CUDA, *BY_TRITON])
def test_equals_float64(gpu: str, rows: int, width: int, kind: str) -> None:
    """And the same bits again; the sum's are PyTorch's. The bounds see what another row's gradient would make."""
    given = draw(rows, width, kind, gpu)
    taken = norm_backward_cuda.takes(given["dout"], given.get("dtotal"), given["x"], given["weight"])
    assert taken == ((rows, width) in BY_CUDA)
    found, again = results_of(given), results_of(given)
    assert wrong_results(given, found) == set()
    assert all(torch.equal(found[name], again[name]) for name in found)
    if kind == "added":
        assert torch.equal(found["total"], given["x"] + given["delta"])
    if rows > 4:
        later = given | {"dout": given["dout"].roll(1, 0)}
        assert wrong_results(later, found) == {"dx", "dweight"} | ({"ddelta"} if kind == "added" else set())


@pytest.mark.gpu
def test_gradients_that_are_not_dense_or_start_anywhere(gpu: str) -> None:
    """An expanded one, as a sum's is; and one at an odd multiple of 2 bytes, which goes to Triton."""
    given = draw(100, 768, "added", gpu)
    given["dout"] = given["dout"][:1].expand(100, 768)
    assert wrong_results(given, results_of(given)) == set()
    odd = torch.empty(100 * 768 + 1, device=gpu, dtype=torch.bfloat16)[1:].view(100, 768)
    given["dtotal"] = odd.copy_(given["dtotal"])
    assert wrong_results(given, results_of(given)) == set()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [250, 264, 768, 1024])
def test_where_the_gains_gradient_goes(gpu: str, width: int) -> None:
    """Added to what is there; over it, where that is stale; and rounded to autograd without an accumulator."""
    given = draw(2000, width, "alone", gpu)
    found = results_of(given)
    first = found["dweight"]
    assert torch.equal(results_of(given, before=2.5)["dweight"], 2.5 + first)
    weight = given["weight"].detach().requires_grad_()
    weight.main_grad, weight.main_grad_stale = torch.full((width,), float("nan"), device=gpu), True
    module.rms_norm(given["x"], weight, EPS).backward(given["dout"])
    assert torch.equal(weight.main_grad, first)
    assert weight.main_grad_stale is False
    module.rms_norm(given["x"], weight, EPS).backward(given["dout"])
    assert torch.equal(weight.main_grad, first + first)
    plain = given["weight"].detach().requires_grad_()
    module.rms_norm(given["x"], plain, EPS).backward(given["dout"])
    assert torch.equal(plain.grad, first.bfloat16())
    frozen, x = given["weight"].detach(), given["x"].detach().requires_grad_()
    module.rms_norm(x, frozen, EPS).backward(given["dout"])
    assert torch.equal(x.grad, found["dx"])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [250, 768])
def test_no_rows(gpu: str, width: int) -> None:
    """The gain's gradient is 0, and is written where it is stale."""
    x = torch.empty(2, 0, width, device=gpu, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(width, device=gpu, dtype=torch.bfloat16).requires_grad_()
    weight.main_grad, weight.main_grad_stale = torch.full((width,), float("nan"), device=gpu), True
    total, out = module.add_rms_norm(x, x.detach(), weight, EPS)
    torch.autograd.backward((total, out), (torch.zeros_like(total), torch.zeros_like(out)))
    assert total.shape == out.shape == x.grad.shape == (2, 0, width)
    assert bool((weight.main_grad == 0).all())


@pytest.mark.gpu
def test_only_the_norm_leads_on(gpu: str) -> None:
    given = draw(300, 768, "alone", gpu)
    x, weight = given["x"].detach().requires_grad_(), given["weight"]
    module.add_rms_norm(x, None, weight, EPS)[1].backward(given["dout"])
    assert torch.equal(x.grad, results_of(given)["dx"])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [250, 768, 2048])
def test_a_captured_graph_reads_new_inputs(gpu: str, width: int, capture: Any) -> None:
    first, second = draw(3000, width, "added", gpu), draw(3000, width, "added", gpu)
    for tensor in second.values():
        tensor.mul_(-1.5).add_(0.25)
    expected = [results_of(first), results_of(second)]
    graph, found = capture(lambda: results_of(first))
    graph.replay()
    assert all(torch.equal(found[name], expected[0][name]) for name in found)
    for name, tensor in first.items():
        tensor.copy_(second[name])
    graph.replay()
    assert all(torch.equal(found[name], expected[1][name]) for name in found)
