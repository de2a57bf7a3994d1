"""The norm of many tensors as one: the reference against float64; in CUDA on a GPU (`-m gpu`)."""

from functools import partial
from typing import Any

import pytest
import torch
from nmoe.kernels.errors import ShapeError
from nmoe.kernels.reference.global_norm import global_norm
from torch._subclasses.fake_tensor import FakeTensorMode

SIZES = {
    "one": (1,),
    "odd": (7, 1, 4099),
    "many": tuple(range(1, 70)),
    "large": (1056 * 256 * 4 * 8 * 2 + 13, 64, 1056 * 256 * 4 + 1),
}
"""In elements; `many` are more than one launch takes, `large` has every part of the kernel's loops."""


def draw(name: str) -> list[torch.Tensor]:
    return [torch.randn(n) * (1 + i) for i, n in enumerate(SIZES[name])]


def exact(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


@pytest.mark.parametrize("name", [name for name in SIZES if name != "large"])
def test_equals_float64(name: str) -> None:
    tensors = draw(name)
    found = global_norm(tensors)
    assert (found.shape, found.dtype) == ((), torch.float32)
    assert found.item() == pytest.approx(exact(tensors), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_shows(bad: float) -> None:
    tensors = draw("odd")
    tensors[2][-1] = bad
    assert not global_norm(tensors).isfinite()


# --- in CUDA ---------------------------------------------------------------------------------------------------------

module = pytest.importorskip("nmoe.kernels.native.global_norm_cuda", reason="the CUDA kernels are for Linux")
cuda = partial(torch.empty, device="cuda")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (lambda: [], "one tensor or more"),
        (lambda: [cuda(8).bfloat16()], "tensor 0 of 8.*float32.*found.*bfloat16"),
        (lambda: [cuda(8), torch.empty(8)], "tensor 1 of 8.*found.*cpu"),
        (lambda: [cuda(8), cuda(16)[::2]], "tensor 1 of 8.*found.*strided"),
    ],
)
def test_refusals(tensors: Any, told: str) -> None:
    with FakeTensorMode(), pytest.raises(ShapeError, match=told):
        module.global_norm(tensors())


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
def test_equals_float64_on_a_gpu(gpu: str, name: str) -> None:
    """Some 2^8 terms in fp32 one after another; and the same bits again."""
    tensors = draw(name)
    there = [tensor.to(gpu) for tensor in tensors]
    first, second = module.global_norm(there), module.global_norm(there)
    assert (first.shape, first.dtype) == ((), torch.float32)
    assert torch.equal(first, second)
    assert first.item() == pytest.approx(exact(tensors), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [0, 3, 5, 4095, 1056 * 1024 - 1, 1056 * 1024, 1056 * 8192 - 1, 1056 * 8192, -1])
def test_every_element_counts_once(gpu: str, place: int) -> None:
    tensor = torch.zeros(1056 * 8192 * 2 + 13, device=gpu)
    tensor[place] = 3.0
    assert module.global_norm([tensor, tensor[:64]]).item() == pytest.approx((9 * (1 + (0 <= place < 64))) ** 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_shows_on_a_gpu(gpu: str, bad: float) -> None:
    tensors = [tensor.to(gpu) for tensor in draw("odd")]
    tensors[2][-1] = bad
    assert not module.global_norm(tensors).isfinite()


@pytest.mark.gpu
def test_empty_tensors_count_nothing(gpu: str) -> None:
    assert module.global_norm([torch.zeros(0, device=gpu), torch.full((4,), 2.0, device=gpu)]).item() == 4.0


@pytest.mark.gpu
def test_a_view_off_16_bytes_is_refused(gpu: str) -> None:
    with pytest.raises(ShapeError, match="tensor 0 to start at a multiple of 16 bytes"):
        module.global_norm([torch.zeros(9, device=gpu)[1:]])


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    tensors = [tensor.to(gpu) for tensor in draw("odd")]
    module.global_norm(tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = module.global_norm(tensors)
    tensors[0].fill_(100.0)
    graph.replay()
    assert torch.equal(norm, module.global_norm(tensors))
