"""This rank's samples of every global batch, made a step ahead: read by a thread of its own and, on a GPU, copied there
beside the step that runs.

Shapes: S sequence, N this rank's sequences of a step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from nmoe.rdep.world import World
from nmoe.train.protocols import BatchSource, Documents
from nmoe.train.schema import TrainConfig

_SLOTS = 3
"""One that is filled, one whose step runs, and one whose step the host has not read yet: it may ask for it again."""


class StepBatch(NamedTuple):
    """This rank's samples of one global batch, its micro-batches one after the other; or one micro-batch of them."""

    sample_NS1: torch.Tensor
    """int64 tokens."""
    document_start_NS: torch.Tensor | None = None
    """int32, for each input the first position of its document; None: a sample is one document."""
    target_NS: torch.Tensor | None = None
    """int64, -100 where nothing is to be predicted; None: every token but the first is a target."""
    n_targets: int | None = None
    """Targets that count, of the whole; None: all do."""

    def micro_batches(self, size: int) -> Iterator["StepBatch"]:
        """Its parts of `size` sequences, in order."""
        for first in range(0, len(self.sample_NS1), size):
            yield self._each(itemgetter(slice(first, first + size)))

    def buffers(self, size: int, device: torch.device, *, pinned: bool = False) -> "StepBatch":
        """Memory for `size` sequences of what this one has."""

        def empty(tensor: torch.Tensor) -> torch.Tensor:
            return torch.zeros(size, *tensor.shape[1:], dtype=tensor.dtype, device=device, pin_memory=pinned)

        return self._each(empty)

    def copy_(self, source: "StepBatch") -> None:
        """Takes over the values of `source`, which has the same tensors; on a GPU in the current stream's order."""
        for mine, theirs in zip(self[:3], source[:3], strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=True)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "StepBatch":
        starts, targets = self.document_start_NS, self.target_NS
        return StepBatch(
            function(self.sample_NS1),
            None if starts is None else function(starts),
            None if targets is None else function(targets),
            self.n_targets,
        )


class Batches:
    """Gives the batch at a cursor, which may be any; the one that is expected next is made meanwhile.

    What is given depends on the cursor alone: a batch that was made for another is thrown away. The run's cursor counts
    what was taken, never what was made ahead.
    """

    def __init__(
        self, source: BatchSource, settings: TrainConfig, world: World, documents: Documents | None = None
    ) -> None:
        """Nothing is read before the first `take`, and nothing beyond the last step."""
        self._source, self._documents, self._device = source, documents, world.device
        self._size, self._step = settings.micro_batch_size, settings.batch_size
        # Micro-batches go to the ranks in turn, so that their order does not depend on how many ranks there are.
        self._firsts = range(world.rank * self._size, self._step, world.size * self._size)
        self._end = settings.steps * self._step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatch]] | None = None
        self._ring: _Ring | None = None

    def take(self, cursor: int) -> StepBatch:
        """This rank's samples of the global batch at `cursor`.

        On a GPU they lie in its memory, for what the current stream is told until the call after the next one.

        Raises:
            Whatever the source raises, here and not before.
        """
        batch = self._made(cursor)
        if self._ring is not None:
            self._ring.taken()
        expected = cursor + self._step
        self._ahead = (expected, self._begin(expected)) if expected < self._end else None
        return batch

    def close(self) -> None:
        """Ends the thread, and waits for nothing that the GPU was told: a step may never end, where ranks were lost."""
        self._thread.shutdown(cancel_futures=True)

    def _made(self, cursor: int) -> StepBatch:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == cursor:
            return ahead[1].result()
        if ahead is not None:
            with suppress(Exception):  # of a batch that nobody asked for
                ahead[1].result()
        return self._begin(cursor).result()

    def _begin(self, cursor: int) -> "Future[StepBatch]":
        if self._device.type != "cuda":
            return self._thread.submit(self._read, cursor)
        if self._ring is None:
            # Here and now, since memory is not to be had while a CUDA graph is captured.
            first = self._thread.submit(self._read, cursor).result()
            self._ring = _Ring(first, self._device)
            self._ring.give()
            return self._thread.submit(self._ring.fill, first)
        self._ring.give()
        return self._thread.submit(self._read_to_gpu, cursor, self._ring)

    def _read(self, cursor: int) -> StepBatch:
        sample_NS1 = np.concatenate([self._source.batch(cursor + first, self._size) for first in self._firsts])
        starts = targets = None
        if self._documents is not None:
            starts, targets = self._documents.starts(sample_NS1), self._documents.targets(sample_NS1)
        return StepBatch(
            torch.from_numpy(sample_NS1),
            None if starts is None else torch.from_numpy(starts),
            None if targets is None else torch.from_numpy(targets),
            None if targets is None else int((targets >= 0).sum()),
        )

    def _read_to_gpu(self, cursor: int, ring: "_Ring") -> StepBatch:
        return ring.fill(self._read(cursor))


class _Slot:
    """Memory for one batch, on the host and on the GPU."""

    def __init__(self, like: StepBatch, device: torch.device, copies: torch.cuda.Stream) -> None:
        size = len(like.sample_NS1)
        self.pinned = like.buffers(size, torch.device("cpu"), pinned=True)
        self.on_gpu = like.buffers(size, device)
        for tensor in self.on_gpu[:3]:
            if tensor is not None:
                tensor.record_stream(copies)  # freed at any time, it serves nobody else before the last copy is done
        self.free, self.copied = torch.cuda.Event(), torch.cuda.Event()
        """When all that was told to read the GPU's memory has; when the copy to it is done."""


class _Ring:
    """Slots in turn. Who takes batches calls `give` and `taken`, on the step's stream; `fill` is called between the
    two, on a thread of its own.

    A slot's memory on the GPU is overwritten once all has run that its stream was told before `give`: whatever reads
    the slot's last batch among it, however many micro-batches. Its pinned memory is overwritten once the copy out of it
    is done. And what the stream is told after `taken` runs once the copy in is done.
    """

    def __init__(self, like: StepBatch, device: torch.device) -> None:
        # With its number: a thread of its own has a current device of its own.
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._copies = torch.cuda.Stream(self._device)
        self._slots = [_Slot(like, self._device, self._copies) for _ in range(_SLOTS)]
        self._next = 0

    def give(self) -> None:
        self._slots[self._next].free.record(torch.cuda.current_stream(self._device))

    def fill(self, batch: StepBatch) -> StepBatch:
        slot = self._slots[self._next]
        slot.copied.synchronize()
        slot.pinned.copy_(batch)
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.free)
            slot.on_gpu.copy_(slot.pinned)
            slot.copied.record(self._copies)
        return slot.on_gpu._replace(n_targets=batch.n_targets)

    def taken(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._slots[self._next].copied)
        self._next = (self._next + 1) % _SLOTS
