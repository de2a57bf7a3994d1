"""What the kernel tests share: one thread, a fixed seed, the reference tier, and a recorder of what an op allocates."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nmoe.kernels.ops import Ops, select_ops
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ops() -> Ops:
    return select_ops("reference", "cpu")


class Allocations(TorchDispatchMode):
    """Notes the size of every tensor that an op returns, and the op's name."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.ops: list[str] = []

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(torch.Size(shape).numel() for shape in self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        self.shapes += [tuple(x.shape) for x in _tensors(out)]
        return out


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for item in out:
            yield from _tensors(item)


@pytest.fixture
def allocations() -> Allocations:
    """Used as a context manager; see `Allocations`."""
    return Allocations()
