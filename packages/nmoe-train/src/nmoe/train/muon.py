"""Which matrices Muon orthogonalises together, where they lie, and what that costs."""

from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from nmoe.train.flat import FlatGroup
from nmoe.train.layout import Shape

MUON_BATCH_ELEMENTS = 1 << 26
"""Bound on the elements of Muon's matrices that are orthogonalised together, unless one matrix (of an odd size: eight)
has more.

They take temporaries, on a GPU in bf16: three tensors of their size and two of the short side squared; at most (square
matrices) five times 128 MiB.
"""


class MuonBatch(NamedTuple):
    """Equal matrices that lie one after another in a group's shards, orthogonalised together."""

    start: int
    """Of the first in a shard, in elements."""
    shape: tuple[int, int, int]
    """Matrices, rows, columns."""

    def view(self, shard: torch.Tensor) -> torch.Tensor:
        """The matrices in a shard of the group."""
        count, rows, columns = self.shape
        return shard[self.start : self.start + count * rows * columns].view(self.shape)


class WeightRun(NamedTuple):
    """Matrices of a batch that lie one after another in the group's weights too."""

    matrices: slice
    """Of the batch."""
    weight: torch.Tensor
    """Their weights: (matrices, rows, columns)."""


def newton_schulz_cost(shape: Shape) -> float:
    """Multiplications of an iteration on a parameter's matrices, by which ranks divide them evenly."""
    short, long = sorted(shape[-2:])
    return prod(shape[:-2]) * (2.0 * short * short * long + short**3)


def muon_batches(group: FlatGroup[Any]) -> list[MuonBatch]:
    """All matrices of this rank's shard, in batches of at most `MUON_BATCH_ELEMENTS` and of even sizes, each from a
    multiple of eight elements on."""
    runs: list[MuonBatch] = []
    for name, shape in group.shapes.items():
        for part in group.layout.parts(name, shape.numel()):
            rows, columns = shape[-2:]
            size = rows * columns
            last = runs[-1] if runs else None
            if last is not None and last.shape[1:] == (rows, columns) and last.start + last.shape[0] * size == part.at:
                runs[-1] = MuonBatch(last.start, (last.shape[0] + part.size // size, rows, columns))
            else:
                runs.append(MuonBatch(part.at, (part.size // size, rows, columns)))
    return [batch for run in runs for batch in _divide(run)]


def weight_runs(group: FlatGroup[Any], batch: MuonBatch) -> list[WeightRun]:
    """Where a batch's weights lie: in one run for each piece of the shard that it reaches into."""
    rows, columns = batch.shape[1:]
    size, stop = rows * columns, batch.start + batch.shape[0] * rows * columns
    runs = []
    for span in group.layout.spans():
        first, last = max(batch.start, span.at), min(stop, span.at + span.size)
        if first < last:
            start = span.start + first - span.at
            weight = group.weight[start : start + last - first].view(-1, rows, columns)
            runs.append(WeightRun(slice((first - batch.start) // size, (last - batch.start) // size), weight))
    return runs


def _divide(run: MuonBatch) -> Iterator[MuonBatch]:
    matrices, rows, columns = run.shape
    batches = -(-matrices // max(1, MUON_BATCH_ELEMENTS // (rows * columns)))
    # Matrices that fill pieces of 16 bytes, at which kernels want a tensor to start.
    whole = 8 // gcd(8, rows * columns)
    each = -(-matrices // batches // whole) * whole
    for first in range(0, matrices, each):
        yield MuonBatch(run.start + first * rows * columns, (min(each, matrices - first), rows, columns))
