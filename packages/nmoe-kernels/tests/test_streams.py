"""The launch of kernels that stream flat tensors, without a GPU: a grid that covers every element, once."""

import ctypes
from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="the CUDA kernels are for Linux")
from nmoe.kernels.native import streams


class Params(ctypes.Structure):
    _fields_ = (("n", ctypes.c_uint64),)


class Kernel:
    """Notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def launch(self, *arguments: Any) -> None:
        self.launches.append(arguments)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (2047, 1), (2048, 1), (2049, 2), (10_000, 5)])
def test_blocks_cover_every_element(n: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert streams.THREADS * streams.PIECES * 4 == 2048
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    kernel, params = Kernel(), Params(n)
    streams.launch_over(torch.empty(n), kernel, params)
    assert kernel.launches == [((blocks, 1, 1), streams.THREADS, 0, params)]


def test_no_elements_need_no_launch() -> None:
    kernel = Kernel()
    streams.launch_over(torch.empty(3, 0), kernel, Params(0))
    assert kernel.launches == []
