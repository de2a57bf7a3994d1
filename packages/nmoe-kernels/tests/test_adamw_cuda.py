"""AdamW in CUDA: refusals without a GPU; on one (`-m gpu`), bit for bit the reference there, and near it on the CPU."""

from functools import partial
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.adamw import adamw_ as reference
from nmoe.kernels.reference.adamw import adamw_scalars
from nmoe.kernels.reference.master import load_master, split_master
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native.adamw_cuda import adamw_

HYPER: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
ROUNDING = 2.0**-24

cuda = partial(torch.empty, device="cuda")
NARROW: dict[str, Any] = {"dtype": torch.bfloat16}


def arguments(**changes: Any) -> list[Any]:
    given = {
        "weight": cuda(8, **NARROW),
        "residual": cuda(8, dtype=torch.int16),
        "grad": cuda(8),
        "exp_avg": cuda(8),
        "exp_avg_sq": cuda(8),
        "grad_scale": cuda(()),
        "ok": cuda((), dtype=torch.int32),
        "scalars": cuda(3),
    }
    return list((given | changes).values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (lambda: {"weight": cuda(8)}, "weight of 8.*bfloat16.*found.*float32"),
        (lambda: {"residual": None}, "weight of 8.*float32.*found.*bfloat16"),
        (lambda: {"weight": torch.empty(8, **NARROW)}, "on a CUDA device; found.*cpu"),
        (lambda: {"grad": cuda(8, **NARROW)}, "grad of 8.*float32.*found.*bfloat16"),
        (lambda: {"grad": cuda(9)}, r"grad of 8.*found \(9,\)"),
        (lambda: {"grad": torch.empty(8)}, "grad of 8.*found.*cpu"),
        (lambda: {"exp_avg": cuda(16)[::2]}, "exp_avg of 8.*found.*strided"),
        (lambda: {"exp_avg_sq": cuda(8).double()}, "exp_avg_sq of 8.*found.*float64"),
        (lambda: {"residual": cuda(8, dtype=torch.int32)}, "residual of 8.*int16.*found.*int32"),
        (lambda: {"grad_scale": cuda(2)}, r"grad_scale of 1 elements.*found \(2,\)"),
        (lambda: {"ok": cuda(())}, "ok of 1.*int32.*found.*float32"),
        (lambda: {"ok": torch.empty((), dtype=torch.int32)}, "ok of 1.*found.*cpu"),
        (lambda: {"scalars": cuda(2)}, r"scalars of 3 elements.*found \(2,\)"),
    ],
)
def test_refusals(changes: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        adamw_(*arguments(**changes()), **HYPER)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def draw(n: int, split: bool) -> list[torch.Tensor | None]:
    """Weight, residual, gradient and moments; of many sizes: from where eps rules to where nothing does."""
    size = 10.0 ** torch.randint(-9, 3, (n,))
    master = torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,))
    weight, residual = split_master(master) if split else (master, None)
    return [weight, residual, torch.randn(n) * size, torch.randn(n) * size, torch.rand(n) * size**2]


def on(device: str, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.clone().to(device) for tensor in tensors]


def numbers(device: str, step: int, scale: float = 0.37, ok: int = 1) -> list[torch.Tensor]:
    scalars = adamw_scalars(lr=3e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, step=step)
    return [
        torch.tensor(scale, device=device),
        torch.tensor(ok, dtype=torch.int32, device=device),
        torch.tensor(scalars, dtype=torch.float32, device=device),
    ]


def same(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 1023, 2047, 2048, 2049, 4097, (1 << 20) + 3])
def test_bits_are_the_references_on_the_gpu(gpu: str, n: int, split: bool) -> None:
    """Around a thread's four, a block's 2048, and many blocks. An operation that the compiler fused would show."""
    given = draw(n, split)
    ours, theirs = on(gpu, given), on(gpu, given)
    for step in range(1, 4):
        adamw_(*ours, *numbers(gpu, step), **HYPER)
        reference(*theirs, *numbers(gpu, step), **HYPER)
        assert same(ours, theirs), step
    assert not same(ours[:1], on(gpu, given)[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
def test_follows_the_reference_on_the_cpu(gpu: str, split: bool) -> None:
    """Three steps. The CPU's root may be a unit of 2^-24 off: eight units, of the weight or of what moved it."""
    given = draw(100_000, split)
    ours, theirs = on(gpu, given), on("cpu", given)
    moved = torch.zeros(100_000)
    for step in range(1, 4):
        before = load_master(*theirs[:2]).clone()
        adamw_(*ours, *numbers(gpu, step), **HYPER)
        reference(*theirs, *numbers("cpu", step), **HYPER)
        moved += (load_master(*theirs[:2]) - before).abs()
    found, expected = load_master(*on("cpu", ours)[:2]), load_master(*theirs[:2])
    assert ((found - expected).abs() <= 8 * ROUNDING * (expected.abs() + moved)).all()
    assert same(on("cpu", ours)[3:], theirs[3:]), "the moments take no root"


@pytest.mark.gpu
@pytest.mark.parametrize("split", [True, False], ids=["split", "plain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_without_ok_every_bit_stays(gpu: str, split: bool, value: float) -> None:
    given = draw(5001, split)
    given[2] = torch.full((5001,), value)
    ours = on(gpu, given)
    adamw_(*ours, *numbers(gpu, 2, scale=value, ok=0), **HYPER)
    assert same(on("cpu", ours), given)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2046, 4098])
def test_nothing_beyond_the_parameter_is_touched(gpu: str, n: int) -> None:
    given = draw(n + 64, True)
    ours = on(gpu, given)
    adamw_(*(None if t is None else t[:n] for t in ours), *numbers(gpu, 1), **HYPER)
    assert same([t if t is None else t[n:] for t in on("cpu", ours)], [t if t is None else t[n:] for t in given])


@pytest.mark.gpu
def test_a_view_off_16_bytes_is_refused(gpu: str) -> None:
    ours = on(gpu, draw(12, True))
    with pytest.raises(ShapeError, match="weight to start at a multiple of 16 bytes"):
        adamw_(ours[0][4:], *(None if t is None else t[:8] for t in ours[1:]), *numbers(gpu, 1), **HYPER)


@pytest.mark.gpu
def test_beyond_2_to_the_31_elements(gpu: str) -> None:
    """The last elements are found: their places pass 32 bits, and their bytes 33."""
    n, tail = (1 << 31) + 4096, 5000
    given = draw(tail, True)
    dtypes = (torch.bfloat16, torch.int16, torch.float32, torch.float32, torch.float32)
    ours = [torch.zeros(n, dtype=dtype, device=gpu) for dtype in dtypes]
    for whole, part in zip(ours, given, strict=True):
        whole[-tail:] = part
    theirs = on(gpu, given)
    adamw_(*ours, *numbers(gpu, 1), **HYPER)
    reference(*theirs, *numbers(gpu, 1), **HYPER)
    assert same([whole[-tail:].clone() for whole in ours], theirs)
    assert not any(whole[:-tail].any() for whole in ours), "zeros stay zeros"


@pytest.mark.gpu
def test_in_a_cuda_graph_the_numbers_are_those_of_its_time(gpu: str) -> None:
    given = draw(10_000, True)
    ours, theirs = on(gpu, given), on(gpu, given)
    words = numbers(gpu, 1)
    adamw_(*on(gpu, given), *words, **HYPER)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_(*ours, *words, **HYPER)
    for step, ok in ((1, 1), (2, 0), (3, 1)):
        for word, value in zip(words, numbers(gpu, step, ok=ok), strict=True):
            word.copy_(value)
        graph.replay()
        adamw_(*theirs, *numbers(gpu, step, ok=ok), **HYPER)
        assert same(ours, theirs), step
