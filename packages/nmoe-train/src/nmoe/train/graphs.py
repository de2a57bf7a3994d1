"""Pieces of a training step as CUDA graphs: one launch each, whatever they hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepGraphs:
    """Runs pieces of a step eagerly until `warm`, then captures each at its next call and replays it from there on.

    A piece reads and writes tensors at fixed addresses only, and waits for nothing. All graphs share one memory pool:
    they run one after the other, and what a piece leaves behind lies outside of the pool.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.MemPool()  # goes after its graphs, also where nobody releases them
        self._warm = False

    def run(self, name: str, piece: Callable[[], None]) -> None:
        """Runs the piece of that name on the current stream, which must be no default stream and always the same."""
        if not self._warm:
            piece()
            return
        if name not in self._graphs:
            self._graphs[name] = self._capture(piece)
        self._graphs[name].replay()

    def warm(self) -> None:
        """Every piece has run: its kernels are compiled and loaded, which a capture could not do."""
        self._warm = True

    @contextmanager
    def memory(self) -> Iterator[None]:
        """What is allocated in the block comes from the graphs' pool, which is free between their replays; the next
        replay writes over what is still held of it."""
        if not self._graphs:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool):
            yield

    @property
    def replays(self) -> bool:
        """Whether pieces are replayed by now, without Python."""
        return self._warm

    def release(self) -> None:
        """Gives the graphs and their memory back; pieces run eagerly from now on."""
        torch.cuda.synchronize()
        self._graphs.clear()
        self._warm = False
        self._pool = torch.cuda.MemPool()
        torch.cuda.empty_cache()

    def _capture(self, piece: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # thread_local: other threads, which write checkpoints and metrics, may call what a capture may not.
        pool: Any = self._pool.id  # the lowest PyTorch that is supported, 2.11, takes no MemPool
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            piece()
        return graph
