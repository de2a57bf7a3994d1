"""The last sum of gains' gradients: where it goes without a GPU, and that no register is spilled; on one, by the kernel
(`-m gpu`)."""

from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import gain_cuda as module
from nmoe.kernels.native.gain_cuda import deliver_sums

KINDS = ("returned", "overwritten", "added", "unwanted", "fp64", "strided")
"""Of what becomes of a gain's gradient."""
BEFORE = 3.0


def gain_of(kind: str, width: int, device: str) -> torch.Tensor:
    gain = torch.ones(width, device=device).bfloat16()
    if kind != "returned":
        dtype = torch.float64 if kind == "fp64" else torch.float32
        gain.main_grad = torch.full((width * 2,), BEFORE, device=device, dtype=dtype)
        gain.main_grad = gain.main_grad[::2] if kind == "strided" else gain.main_grad[:width]
        gain.main_grad_stale = kind == "overwritten"
    return gain


def check(kinds: tuple[str, ...], partials: int, width: int, device: str) -> list[torch.Tensor]:
    """Runs it, and compares with float64; gives what it wrote."""
    partial = torch.randn(partials, len(kinds), width, device=device)
    gains = [gain_of(kind, width, device) for kind in kinds]
    grads = deliver_sums(gains, partial, [kind != "unwanted" for kind in kinds])
    written = []
    size = partial.double().abs().sum(0)
    for kind, gain, grad, exact, terms in zip(kinds, gains, grads, partial.double().sum(0), size, strict=True):
        found, bound = gain.main_grad if kind != "returned" else grad, 2.0**-20 * terms
        assert found is not None
        assert (grad is None) == (kind != "returned")
        if kind == "unwanted":
            assert bool((found == BEFORE).all())
            continue
        if kind == "returned":
            assert found.dtype == torch.bfloat16
            bound = bound + 1.01 * 2.0**-8 * exact.abs()
        else:
            assert not gain.main_grad_stale
        expected = exact if kind in ("returned", "overwritten") else exact + BEFORE
        bound = bound + 2.0**-22 * (terms + BEFORE)
        assert bool(((found.double() - expected).abs() <= bound).all()), kind
        written.append(found.clone())
    return written


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gpu_it_goes_where_deliver_puts_it(kind: str) -> None:
    check((kind,), 5, 24, "cpu")
    check((kind, "added"), 5, 24, "cpu")
    check(("returned", kind), 0, 24, "cpu")


def test_one_memory_for_both_gains_gets_both_sums() -> None:
    """Which one launch would write at once."""
    first, second = gain_of("added", 8, "cpu"), gain_of("added", 8, "cpu")
    assert module._fit([first.main_grad, second.main_grad, None, None])
    second.main_grad = first.main_grad
    assert not module._fit([first.main_grad, second.main_grad])
    deliver_sums((first, second), torch.ones(4, 2, 8), (True, True))
    assert bool((first.main_grad == BEFORE + 8).all())
    assert deliver_sums((first, second), torch.ones(4, 2, 8), (False, False)) == [None, None]
    assert bool((first.main_grad == BEFORE + 8).all())


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_no_register_is_spilled(arch: str, ahead: Any) -> None:
    for source in module.SOURCES:
        found = ahead.cuda.get(source, arch).resources
        assert not found.spills, source.name
        assert found.registers * module._THREADS <= 1 << 16


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 40, 2048])
@pytest.mark.parametrize("partials", [0, 1, 132, 161, 2048, 2500])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(gpu: str, kind: str, partials: int, width: int) -> None:
    """Fewer rows of partial sums than a thread reads at once, and more; and the same bits again."""
    for kinds in ((kind,), (kind, "added"), ("returned", kind)):
        torch.manual_seed(0)
        first = check(kinds, partials, width, gpu)
        torch.manual_seed(0)
        again = check(kinds, partials, width, gpu)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_nothing_beside_is_written(gpu: str) -> None:
    """Gains of a width that ends within a block's columns."""
    memory = torch.full((2, 100), BEFORE, device=gpu)
    gains = [gain_of("overwritten", 40, gpu) for _ in range(2)]
    for gain, room in zip(gains, memory, strict=True):
        gain.main_grad = room[30:70]
    deliver_sums(gains, torch.ones(7, 2, 40, device=gpu), (True, True))
    expected = torch.full_like(memory, BEFORE)
    expected[:, 30:70] = 7.0
    assert torch.equal(memory, expected)


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str, capture: Any) -> None:
    """Added at each replay."""
    gains, partial = [gain_of("added", 64, gpu) for _ in range(2)], torch.ones(9, 2, 64, device=gpu)
    graph, _ = capture(lambda: deliver_sums(gains, partial, (True, True)))
    for gain in gains:
        gain.main_grad.zero_()
    for _ in range(2):
        graph.replay()
    assert all(bool((gain.main_grad == 18.0).all()) for gain in gains)
