"""Times of work that several GPUs do together: all begin at once, and the slowest rank's time counts."""

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from nmoe.rdep.world import World

_WARM_UP, _RUNS = 5, 30


def time_together(world: World, run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Median milliseconds from the moment that all ranks have begun until the last has ended.

    Args:
        world: the ranks.
        run: what is timed.
        before: is done before each run, untimed.
    """
    start = torch.zeros(1, device=world.device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_RUNS)]
    for number in range(_WARM_UP + _RUNS):
        before()
        world.sum_(start)  # a GPU passes this when all have come to it
        first, last = pairs[max(0, number - _WARM_UP)]
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    ms = torch.tensor([first.elapsed_time(last) for first, last in pairs], device=world.device)
    ms.neg_()
    world.min_(ms)  # of the negatives: the slowest rank's
    return median((-ms).tolist())


def time_graph(world: World, run: Callable[[], Any], times: int) -> float:
    """Median milliseconds of one of `times` runs that follow each other in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        world.barrier()
        gc.collect()
        gc.disable()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                for _ in range(times):
                    run()
        finally:
            gc.enable()
        world.barrier()
        ms = time_together(world, graph.replay) / times
    torch.cuda.synchronize()
    del graph
    torch.cuda.empty_cache()
    return ms
