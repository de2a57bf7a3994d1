"""Times of GPU work by events: warmed up, the L2 overwritten before each run, the median of many."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

BUDGET_MS = 150.0
LEAST, MOST = 20, 200
_WARM_UP_S = 0.15
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Of one kind of run in one process."""

    median_ms: float
    runs: int


def time_gpu(run: Callable[[], Any]) -> Timing:
    """Median milliseconds of `run` on the current stream, over as many runs as fit 150 ms, and at least 20."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start = time.perf_counter()
    warm_up = 0
    while warm_up < 3 or time.perf_counter() - start < _WARM_UP_S:
        run()
        torch.cuda.synchronize()
        warm_up += 1
    estimate_ms = median(_events(run, flush, 3))
    runs = runs_in_budget(estimate_ms)
    return Timing(median(_events(run, flush, runs)), runs)


def runs_in_budget(estimate_ms: float) -> int:
    """Runs of `estimate_ms` each that fit the budget, from LEAST to MOST."""
    return max(LEAST, min(MOST, int(BUDGET_MS / max(estimate_ms, 1e-3))))


def _events(run: Callable[[], Any], flush: torch.Tensor, runs: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda.synchronize()
    for before, after in pairs:
        flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairs]


@contextmanager
def captured(run: Callable[[], Any]) -> Iterator[torch.cuda.CUDAGraph]:
    """A CUDA graph of one `run`, what it returned alive while the graph is.

    Raises:
        RuntimeError: PyTorch's, where `run` cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    # A collection within the capture may unload a module, which breaks the capture.
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = run()
    finally:
        gc.enable()
    try:
        yield graph
    finally:
        torch.cuda.synchronize()
        del kept, graph
        torch.cuda.empty_cache()
