"""The Triton `score_rows`: in Triton's interpreter against float64, compiled for Hopper and Blackwell, and on the GPU
at hand, there also as part of `linear_cross_entropy`."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.ops import Ops, select_ops
from nmoe.kernels.reference import cross_entropy

pytest.importorskip("triton", reason="Triton is for Linux")

IGNORE = -100
GUARD = 12345.0
ROUNDING = 2.0**-8
"""Of bf16 to nearest, relative."""

VOCABS = (1, 100, 4096, 5000)
"""Around one block of 4096."""

CASES = [f"{vocab}-{rows}-{kind}" for vocab in VOCABS for rows in (1, 7) for kind in ("plain", "huge")]
CASES += [f"{vocab}-7-{kind}" for vocab in VOCABS for kind in ("ignored", "falling", "masked")]
GPU_CASES = [*CASES, "50257-5-plain", "201088-5-masked", "201088-40-ignored"]

SPOILS = {"nan": float("nan"), "inf": float("inf"), "late_nan": float("nan"), "all_minus_inf": float("-inf")}
"""What stands in row 2 of a broken case."""


def draw(case: str) -> dict[str, np.ndarray]:
    vocab, rows, kind = case.split("-")
    vocab, rows = int(vocab), int(rows)
    rng = np.random.default_rng(GPU_CASES.index(case))
    logits = rng.standard_normal((rows, vocab)) * 3
    target = rng.integers(0, vocab, rows)
    if kind == "huge":
        logits = np.where(rng.random((rows, vocab)) < 0.5, 1e4, -1e4) + logits
    elif kind == "falling":  # no lane ever meets a larger element than its first
        logits = -np.sort(-logits, axis=1) * 10
    elif kind == "ignored":
        target[::2] = IGNORE
        logits[::2] = np.nan  # is not read
    elif kind == "masked":
        logits[rng.random((rows, vocab)) < 0.9] = -np.inf
        logits[np.arange(rows), target] = 1.0
        target[-1], logits[-1, 0] = vocab - 1, 2.0
        logits[-1, -1] = -np.inf if vocab > 1 else 2.0  # an infinite loss
    return {"logits": logits.astype(np.float32), "target": target.astype(np.int64)}


def draw_broken(spoil: str) -> dict[str, np.ndarray]:
    """Row 2 has what must not be hidden; its neighbours are as they were."""
    case = draw("5000-7-plain")
    case["target"][2] = 5
    if spoil == "all_minus_inf":
        case["logits"][2] = SPOILS[spoil]
    elif spoil == "no_such_id":
        case["target"][2] = 5000
    elif spoil == "negative_id":
        case["target"][2] = -1
    else:
        case["logits"][2, 4999 if spoil == "late_nan" else 17] = SPOILS[spoil]
    return case


BROKEN = [*SPOILS, "no_such_id", "negative_id"]


def exact(case: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and their gradients, in float64."""
    logits, target = case["logits"].astype(np.float64), case["target"]
    valid = target != IGNORE
    logits = np.where(valid[:, None], logits, 0.0)
    onehot = np.arange(logits.shape[1]) == target[:, None]
    peak = logits.max(1, keepdims=True)
    power = np.exp(logits - peak)
    total = power.sum(1, keepdims=True)
    aim = np.where(onehot, logits, 0.0).sum(1)
    nll = np.log(total[:, 0]) + peak[:, 0] - aim
    return np.where(valid, nll, 0.0), np.where(valid[:, None], power / total - onehot, 0.0)


def near_nll(found: np.ndarray, expected: np.ndarray, units: int) -> bool:
    """Within roundings of fp32, of a sum's logarithm and of a difference; infinite where it should be."""
    finite = np.isfinite(expected)
    error, size = np.abs(found[finite] - expected[finite]), 1 + np.abs(expected[finite])
    return np.array_equal(found[~finite], expected[~finite]) and bool((error <= units * 2.0**-24 * size).all())


def near_dlogits(found: np.ndarray, expected: np.ndarray) -> bool:
    """Rounded once to bf16; fp32's own errors are an eighth of that, and where 1 was subtracted, of 1."""
    bound = 1.125 * ROUNDING * np.abs(expected) + np.where(expected < 0, 2.0**-20, 1e-30)
    return bool((np.abs(found - expected) <= bound).all())


@pytest.fixture(scope="module")
def interpreted(interpret: Callable[..., dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Results by `<case>/<name>`, from one run of the interpreter."""
    cases = {case: draw(case) for case in CASES} | {spoil: draw_broken(spoil) for spoil in BROKEN}
    return interpret("cross_entropy_interpreted.py", cases)


@pytest.mark.parametrize("case", CASES)
def test_interpreted_equals_float64(interpreted: dict[str, np.ndarray], case: str) -> None:
    drawn = draw(case)
    nll, dlogits = exact(drawn)
    found, gradient = interpreted[f"{case}/nll"], interpreted[f"{case}/dlogits"]
    assert found[-1] == GUARD, "nothing is written past the end"
    assert gradient[-1] == float(torch.tensor(GUARD).bfloat16())
    assert near_nll(found[:-1], nll, 8)
    assert np.array_equal(interpreted[f"{case}/alone"], found[:-1]), "with and without gradient"
    gradient = gradient[:-1].reshape(dlogits.shape)
    assert near_dlogits(gradient, dlogits)
    assert (np.abs(gradient.astype(np.float64).sum(1)) <= 2 * ROUNDING).all(), "softmax and one-hot both sum to 1"
    assert not gradient[drawn["target"] == IGNORE].any()


@pytest.mark.parametrize("spoil", BROKEN)
def test_interpreted_hides_nothing(interpreted: dict[str, np.ndarray], spoil: str) -> None:
    """The row's loss is NaN, and its gradient where a logit is to blame; its neighbours are right."""
    case = draw_broken(spoil)
    found, gradient = interpreted[f"{spoil}/nll"][:-1], interpreted[f"{spoil}/dlogits"][:-1].reshape(7, 5000)
    assert np.isnan(found[2])
    assert np.isnan(interpreted[f"{spoil}/alone"][2])
    assert np.isnan(gradient[2]).all() == (spoil in SPOILS)
    others = np.arange(7) != 2
    nll, dlogits = exact({name: array[others] for name, array in case.items()})
    assert near_nll(found[others], nll, 8)
    assert near_dlogits(gradient[others], dlogits)


@pytest.mark.parametrize("mistake", ["next row's target", "no one-hot", "ignored rows scored", "last block forgotten"])
def test_the_bounds_tell_mistakes_apart(interpreted: dict[str, np.ndarray], mistake: str) -> None:
    name = "5000-7-ignored" if mistake == "ignored rows scored" else "5000-7-plain"
    case = draw(name)
    if mistake == "next row's target":
        case["target"] = np.roll(case["target"], 1)
    elif mistake == "ignored rows scored":
        case["target"] = np.maximum(case["target"], 0)
        case["logits"] = np.nan_to_num(case["logits"])
    elif mistake == "last block forgotten":
        case["target"] %= 4096
        case["logits"][:, 4096:] = -np.inf
    nll, dlogits = exact(case)
    if mistake == "no one-hot":
        dlogits += np.arange(5000) == case["target"][:, None]
    else:
        assert not near_nll(interpreted[f"{name}/nll"][:-1], nll, 32)
    assert not near_dlogits(interpreted[f"{name}/dlogits"][:-1].reshape(7, 5000), dlogits)


def catalog() -> list[Any]:
    from nmoe.kernels.native.cross_entropy_triton import TRITON_KERNELS

    return list(TRITON_KERNELS)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("kernel", catalog(), ids=lambda kernel: kernel.name)
def test_compiles_to_wide_copies(kernel: Any, arch: str, ahead: Any) -> None:
    """16 bytes a load and a store; the second pass is there only for a gradient; 32 warps find room beside each other,
    so that enough loads are in flight."""
    compiled = ahead.triton(kernel, arch)
    assert not compiled.resources.spills
    assert compiled.resources.registers <= 80, "three programs of 8 warps at least"
    text = ahead.ptx(kernel, compiled)
    assert f".target {arch}" in text
    with_grad = dict(kernel.constants)["WITH_GRAD"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", text)) == (8 if with_grad else 4), "4096 elements over 256 threads"
    assert ("st.global.v4.b32" in text) == with_grad


@pytest.mark.parametrize("with_grad", [False, True])
def test_what_is_compiled_ahead_is_what_is_launched(with_grad: bool, launches_of: Any) -> None:
    from nmoe.kernels.native import cross_entropy_triton as module

    names, launches = module._score_rows_kernel.arg_names, launches_of(module, "_score_rows_kernel")
    dlogits = torch.zeros(3, 16).bfloat16() if with_grad else None
    module.score_rows(torch.zeros(3, 16), torch.zeros(3, dtype=torch.int64), torch.zeros(3), dlogits)
    (listed,) = [kernel for kernel in catalog() if dict(kernel.constants)["WITH_GRAD"] == with_grad]
    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    types = [kinds[x.dtype] if isinstance(x, torch.Tensor) else "i32" for x in launches.args]
    assert launches.grid == (3,)
    assert listed.signature == tuple(zip(names, types, strict=False))
    assert launches.options == dict((*listed.constants, *listed.options))


def test_no_rows_are_not_launched(launches_of: Any) -> None:
    from nmoe.kernels.native import cross_entropy_triton as module

    launches = launches_of(module, "_score_rows_kernel")
    module.score_rows(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64), torch.zeros(0), None)
    assert launches.grid is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits_CV": torch.zeros(3, 8).double()}, "expected logits .*float32.*found .*float64"),
        ({"logits_CV": torch.zeros(8, 3).mT}, r"expected logits .*contiguous.*strides \(1, 3\)"),
        ({"target_C": torch.zeros(3, dtype=torch.int32)}, "expected target .*int64.*found .*int32"),
        ({"target_C": torch.zeros(6, dtype=torch.int64)[::2]}, "expected target .*contiguous"),
        ({"target_C": torch.zeros(4, dtype=torch.int64)}, r"expected target \(3,\).*found \(4,\)"),
        ({"target_C": torch.zeros(3, dtype=torch.int64, device="meta")}, "expected target .* on cpu; found .* on meta"),
        ({"nll_C": torch.zeros(3).double()}, "expected nll .*float32.*found .*float64"),
        ({"dlogits_CV": torch.zeros(3, 8)}, "expected dlogits .*bfloat16.*found .*float32"),
        ({"dlogits_CV": torch.zeros(3, 9).bfloat16()[:, :8]}, "expected dlogits .*contiguous"),
    ],
)
def test_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    from nmoe.kernels.native.cross_entropy_triton import score_rows

    fine = {
        "logits_CV": torch.zeros(3, 8),
        "target_C": torch.zeros(3, dtype=torch.int64),
        "nll_C": torch.zeros(3),
        "dlogits_CV": torch.zeros(3, 8).bfloat16(),
    }
    with pytest.raises(ShapeError, match=message) as caught:
        score_rows(**(fine | changed))
    assert "set runtime.kernels = 'reference'" in str(caught.value)


# On the GPU at hand.


@pytest.fixture
def native(gpu: str) -> Ops:
    return select_ops("native", gpu)


def score(case: dict[str, np.ndarray], device: str, with_grad: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients in buffers of NaN: what is not written shows."""
    from nmoe.kernels.native.cross_entropy_triton import score_rows

    logits, target = (torch.from_numpy(case[name]).to(device) for name in ("logits", "target"))
    nll = torch.full(target.shape, float("nan"), device=device)
    dlogits = torch.full(logits.shape, float("nan"), device=device, dtype=torch.bfloat16)
    score_rows(logits, target, nll, dlogits if with_grad else None)
    return nll.cpu().numpy(), dlogits.float().cpu().numpy()


class Head:
    """Rows, head and targets on the GPU, a third of the rows ignored; and float64's loss and gradients of them."""

    def __init__(self, rows: int = 333, width: int = 64, vocab: int = 1000) -> None:
        self.x = (torch.randn(rows, width) / 4).bfloat16().cuda()
        self.weight = torch.randn(vocab, width).bfloat16().cuda()
        self.target = torch.randint(vocab, (rows,)).cuda()
        self.target[::3] = IGNORE

    def exact(self, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.weight))
        loss = torch.nn.functional.cross_entropy(x @ weight.t(), self.target, ignore_index=IGNORE, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss * factor, (x, weight))

    def run(self, ops: Ops, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight = (tensor.detach().requires_grad_() for tensor in (self.x, self.weight))
        loss = ops.linear_cross_entropy(x, weight, self.target)
        return loss.detach(), *torch.autograd.grad(loss * factor, (x, weight))


def norm_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """The loss in fp32's precision (a sum of 64 products, and what the row's sum adds); a gradient has three roundings
    to bf16 at most: of dlogits, of a product, of that times the factor."""
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert norm_error(a, b) < 3 * ROUNDING


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("case", GPU_CASES)
    def test_rows_equal_float64(self, gpu: str, case: str) -> None:
        """The exponential is approximate: 2^-22, and the rounding of an exponent of up to 16 for what counts."""
        drawn = draw(case)
        nll, dlogits = exact(drawn)
        found, gradient = score(drawn, gpu)
        assert near_nll(found, nll, 64)
        assert near_dlogits(gradient, dlogits)
        assert (np.abs(gradient.astype(np.float64).sum(1)) <= 2 * ROUNDING).all()
        assert not gradient[drawn["target"] == IGNORE].any()
        again, same = score(drawn, gpu)
        assert np.array_equal(found, again)
        assert np.array_equal(gradient, same)
        alone, untouched = score(drawn, gpu, with_grad=False)
        assert np.allclose(alone, found, rtol=4e-7, atol=0)  # another compile, whose exponentials may round otherwise
        assert np.isnan(untouched).all()

    @pytest.mark.parametrize("spoil", BROKEN)
    def test_hides_nothing(self, gpu: str, spoil: str) -> None:
        case = draw_broken(spoil)
        found, gradient = score(case, gpu)
        assert np.isnan(found[2])
        assert np.isnan(score(case, gpu, with_grad=False)[0][2])
        assert np.isnan(gradient[2]).all() == (spoil in SPOILS)
        others = np.arange(7) != 2
        nll, dlogits = exact({name: array[others] for name, array in case.items()})
        assert near_nll(found[others], nll, 64)
        assert near_dlogits(gradient[others], dlogits)

    def test_places_beyond_2_to_31(self, gpu: str) -> None:
        """Logits whose elements no int32 counts. Only the last row is filled, and looked at."""
        from nmoe.kernels.native.cross_entropy_triton import score_rows

        vocab, rows = 1 << 20, (1 << 11) + 2
        if torch.cuda.mem_get_info()[0] < 16 << 30:
            pytest.skip("needs 16 GiB of free device memory")
        logits = torch.empty(rows, vocab, device=gpu)
        dlogits = torch.empty(rows, vocab, device=gpu, dtype=torch.bfloat16)
        logits[-1].normal_()
        target = torch.full((rows,), IGNORE, device=gpu)
        target[-1] = vocab - 1
        nll = torch.empty(rows, device=gpu)
        score_rows(logits, target, nll, dlogits)
        case = {"logits": logits[-1:].cpu().numpy(), "target": target[-1:].cpu().numpy()}
        expected, gradient = exact(case)
        assert near_nll(nll[-1:].cpu().numpy(), expected, 64)
        assert near_dlogits(dlogits[-1:].float().cpu().numpy(), gradient)
        assert not dlogits[-2].any()
        assert not nll[:-1].any()

    @pytest.mark.parametrize("chunk", [1 << 29, 100 * 1000, 1000])
    def test_linear_equals_float64(self, native: Ops, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
        """All rows at once, chunks of 64 and a last one of 13, row by row; same bits again."""
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
        head = Head()
        found = head.run(native, 0.3)
        check(found, head.exact(0.3))
        assert all(torch.equal(a, b) for a, b in zip(found, head.run(native, 0.3), strict=True))
        head.target = head.target.roll(1)
        assert norm_error(found[0], head.exact()[0]) > 2.0**-12

    @pytest.mark.parametrize("stale", [False, True])
    def test_main_grad(self, native: Ops, monkeypatch: pytest.MonkeyPatch, stale: bool) -> None:
        """In fp32, with the error of dlogits' rounding alone."""
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 100 * 1000)
        head = Head()
        weight = head.weight.requires_grad_()
        before = torch.full(weight.shape, float("nan")) if stale else torch.randn(weight.shape)
        weight.main_grad, weight.main_grad_stale = before.cuda(), stale
        for _ in range(2):
            (native.linear_cross_entropy(head.x, weight, head.target) * 0.3).backward()
        assert weight.grad is None
        expected = 2 * head.exact(0.3)[2]
        found = weight.main_grad.double() - (0 if stale else before.cuda().double())
        assert norm_error(found, expected) < ROUNDING

    def test_scoring_is_the_same_loss(self, native: Ops) -> None:
        head = Head()
        with torch.no_grad():
            alone = native.linear_cross_entropy(head.x, head.weight, head.target)
        assert torch.equal(alone, head.run(native)[0])

    def test_in_a_cuda_graph(self, native: Ops, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Forward and backward in one graph; a replay sees the inputs of its time."""
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 100 * 1000)
        head = Head()
        graph, captured = capture(lambda: head.run(native))
        for _ in range(2):
            later = Head()
            for name in ("x", "weight", "target"):
                getattr(head, name).copy_(getattr(later, name))
            graph.replay()
            check(captured, later.exact())

    def test_memory(self, native: Ops, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Logits of one chunk in fp32 and their gradient in bf16, the gradients, and what a product needs; the
        reference has a chunk's exponentials besides."""
        rows, width, vocab, chunk = 2048, 128, 1 << 16, 1 << 26
        monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
        head = Head(rows, width, vocab)

        def peak(ops: Ops) -> int:
            head.run(ops)  # compiles, and makes cuBLAS take its workspace
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            head.run(ops)
            return torch.cuda.max_memory_allocated() - before

        found = peak(native)
        assert found <= 6 * chunk + 4 * vocab * width + 2 * rows * width + (64 << 20)
        assert found < peak(select_ops("reference", gpu)) - 2 * chunk
