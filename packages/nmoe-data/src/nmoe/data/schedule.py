"""Which source a sample comes from: a function of the global sample index, at the same small cost everywhere.

Weights are whole numbers p_k over a period P. Within a period sources take turns in one fixed pattern, in which every
prefix of n samples holds each source n·p_k/P times to within less than one sample: R. Tijdeman, "The chairman
assignment problem", 1980. The pattern is found by earliest deadline first, which for the windows that this bound leaves
each sample (S. Baruah et al., "Proportionate progress", 1996) always succeeds.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import MixtureError

LONGEST_PERIOD = 1 << 17
"""Weights are exact up to this common denominator: all that have five decimals and sum to 1."""
ROUNDED_PERIOD = 1 << 16
"""Others are rounded to this one."""


@dataclass(frozen=True)
class Shares:
    """Weights as whole numbers over a period, by source, in the order of the sources' names."""

    counts: Mapping[str, int]
    period: int

    @classmethod
    def of(cls, weights: Mapping[str, Fraction]) -> "Shares":
        """Exact where a period of `LONGEST_PERIOD` can hold them, else rounded by largest remainder.

        Raises MixtureError for a weight that rounds to nothing.
        """
        weights = dict(sorted(weights.items()))
        period = lcm(*(weight.denominator for weight in weights.values()))
        if period <= LONGEST_PERIOD:
            return cls({name: int(weight * period) for name, weight in weights.items()}, period)
        period = ROUNDED_PERIOD
        counts = {name: int(weight * period) for name, weight in weights.items()}
        by_remainder = sorted(weights, key=lambda name: (counts[name] - weights[name] * period, name))
        for name in by_remainder[: period - sum(counts.values())]:
            counts[name] += 1
        for name, count in counts.items():
            if count == 0:
                raise MixtureError(
                    f"the weight of source {name!r}",
                    expected=f"at least 1/{period} of all",
                    found=f"{float(weights[name]):.3g}",
                    remedy="Raise it, or leave the source out.",
                )
        return cls(counts, period)

    @cached_property
    def pattern(self) -> npt.NDArray[np.int64]:
        """The source of each sample of a period, by its place in `counts`."""
        counts, period = list(self.counts.values()), self.period
        pattern = np.empty(period, np.int64)
        # Sample j of source k may stand from place floor(j·P/p) on, and must stand before place ceil((j+1)·P/p).
        waiting = [(0, k, 0) for k in range(len(counts))]
        ready: list[tuple[int, int, int]] = []
        for place in range(period):
            while waiting and waiting[0][0] <= place:
                _, k, j = heapq.heappop(waiting)
                heapq.heappush(ready, (-(-(j + 1) * period // counts[k]), k, j))
            _, k, j = heapq.heappop(ready)
            pattern[place] = k
            if j + 1 < counts[k]:
                heapq.heappush(waiting, ((j + 1) * period // counts[k], k, j + 1))
        return pattern

    @cached_property
    def turns(self) -> npt.NDArray[np.int64]:
        """For each place of the pattern, how often its source has stood before."""
        turns = np.empty(self.period, np.int64)
        for k, count in enumerate(self.counts.values()):
            turns[self.pattern == k] = np.arange(count)
        return turns

    def taken(self, samples: int) -> dict[str, int]:
        """Samples of each source among the first `samples`."""
        whole, rest = divmod(samples, self.period)
        held = np.bincount(self.pattern[:rest], minlength=len(self.counts)).tolist()
        return {name: whole * count + more for (name, count), more in zip(self.counts.items(), held, strict=True)}


@dataclass(frozen=True)
class Span:
    """A stage's samples: `n_samples` from the end of the one before on; None: without end."""

    shares: Shares
    n_samples: int | None


class Schedule:
    """Maps global samples to sources and their own samples, through the stages one after the other."""

    def __init__(self, spans: Sequence[Span], sources: Sequence[str], start: int = 0) -> None:
        """Global sample 0 is the first of span `start`; what the spans before it took stays taken.

        Args:
            spans: all of them but the last have an end.
            sources: names, in the order that `locate` numbers them.
            start: a span's number.
        """
        taken = dict.fromkeys(sources, 0)
        self._stages: list[tuple[int, Shares, npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        first: int = 0
        self.n_samples: int | None = 0
        """Samples that there are; None: without end."""
        for number, span in enumerate(spans):
            names = list(span.shares.counts)
            if number >= start:
                numbers = np.array([sources.index(name) for name in names])
                before = np.array([taken[name] for name in names])
                self._stages.append((first, span.shares, numbers, before, np.array([*span.shares.counts.values()])))
                self.n_samples = None if span.n_samples is None else first + span.n_samples
            if span.n_samples is not None:
                first += span.n_samples if number >= start else 0
                for name, count in span.shares.taken(span.n_samples).items():
                    taken[name] += count

    def locate(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source and the source's own sample number, from 0 over all its epochs, of the global samples from `first` on.

        Both int64 (count,). They must lie under `n_samples`.
        """
        source, index = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, (begin, shares, numbers, before, counts) in enumerate(self._stages):
            end = self._stages[number + 1][0] if number + 1 < len(self._stages) else first + count
            low, high = max(begin, first), min(end, first + count)
            if low >= high:
                continue
            period, place = np.divmod(np.arange(low - begin, high - begin), shares.period)
            own = shares.pattern[place]
            source[low - first : high - first] = numbers[own]
            index[low - first : high - first] = before[own] + period * counts[own] + shares.turns[place]
        return source, index
