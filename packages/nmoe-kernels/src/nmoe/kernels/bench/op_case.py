"""What `ops` measures: one part of one op at one shape, and what it must move and compute.

A case is described by functions: nothing is allocated before it is its turn, and the native tier is imported no sooner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nmoe.kernels.ops import Ops

BF16, FP32, INT32, INT64 = 2, 4, 4, 8
"""Bytes of an element."""

Run = Callable[[], Any]
"""Does the work once and gives what it wrote: whatever is alive is not written over by the next run."""


@dataclass(frozen=True)
class Work:
    """What no implementation of the op can do without."""

    bytes: int
    """Of each input read once and each output written once; what an op is free to keep to itself is not counted."""
    flop: int = 0
    """Two for each multiply-add of its matrix products."""


@dataclass(frozen=True)
class Setting:
    """Which ops, and where."""

    ops: Ops
    device: str

    def normal(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """From N(0, 1)."""
        return torch.randn(*sizes, device=self.device, dtype=dtype)

    def leaf(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """As `normal`, and takes a gradient."""
        return self.normal(*sizes, dtype=dtype).requires_grad_()

    def weight(self, *sizes: int) -> torch.Tensor:
        """A bf16 parameter from N(0, 0.02²) with an fp32 `main_grad`, as a trainer keeps it."""
        weight = self.normal(*sizes).mul_(0.02).requires_grad_()
        weight.main_grad = torch.empty_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        return weight


Make = Callable[[Setting], Run]
"""Prepares one copy of the inputs, forward included where the backward is what runs."""


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work, timed in the same process."""

    name: str
    make: Make


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    op: str
    """What `--ops` names."""
    part: str
    """`forward`, `backward`, or what else is timed."""
    shape: str
    work: Work
    make: Make
    peer: Peer | None = None
    compare_bits: bool = False
    """Whether to run ours and the peer's five times more, and tell if their bits are the same."""
    most_of_peer: float | None = None
    """The time over the peer's above which the command fails."""

    def __str__(self) -> str:
        return f"{self.op} {self.part} {self.shape}"


def backward(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
    gradients: torch.Tensor | Sequence[torch.Tensor] | None,
) -> Run:
    """The gradients of `leaves`, as often as it is called; a weight with a `main_grad` has its written over."""

    def run() -> list[torch.Tensor | None]:
        overwrite(leaves)
        given = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)
        return list(given)

    return run


def overwrite(leaves: Sequence[torch.Tensor]) -> None:
    """Has the next backward write over each `main_grad`, as after a trainer's step."""
    for leaf in leaves:
        if hasattr(leaf, "main_grad"):
            leaf.main_grad_stale = True  # type: ignore[attr-defined]
