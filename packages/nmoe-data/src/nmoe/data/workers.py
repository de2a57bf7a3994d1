"""Tokenizing blocks in order, in this process or spread over worker processes."""

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO

from nmoe.data.blocks import Block, Cut
from nmoe.data.errors import DataError, WorkerDiedError
from nmoe.data.tokenized import Tokenized, tokenize
from nmoe.data.tokenizers import Tokenizer

_IN_FLIGHT = 2
"""Blocks a worker has or finds waiting: it never waits for the next, and memory stays bounded."""

_BYTES_A_WORKER = 1 << 23
"""Of the source, under which starting one costs more than it saves."""


def default_workers(total: int | None) -> int:
    """How many workers to start for `total` bytes (None: not known): one a CPU, fewer where there is little to do."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cpus if total is None else max(1, min(cpus, total // _BYTES_A_WORKER))


def tokenize_blocks(
    cuts: Iterable[Cut], tokenizer: Tokenizer, workers: int, *, digests: bool
) -> Generator[tuple[Cut, Tokenized], None, None]:
    """Each cut with its documents as tokens, in order; the same for any number of workers.

    With one worker all happens in this process. What `cuts` or a block raises comes after the results before it.
    Raises WorkerDiedError if a worker ends by itself.
    """
    if workers == 1:
        for cut in cuts:
            yield cut, tokenize(list(cut.block.documents()), tokenizer, digests=digests)
        return
    job = pickle.dumps((tokenizer, digests))
    processes = [_Worker(number, job) for number in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def answer(block: Block) -> Tokenized:
        process = idle.get()
        try:
            return process.ask(block)
        finally:
            idle.put(process)

    try:
        # A thread only passes a block on and waits for the answer.
        with ThreadPoolExecutor(workers, "worker") as threads:
            try:
                waiting: deque[tuple[Cut, Future[Tokenized]]] = deque()
                for fresh, error in _until_error(cuts):
                    if fresh is not None:
                        waiting.append((fresh, threads.submit(answer, fresh.block)))
                    while waiting and (error is not None or len(waiting) >= _IN_FLIGHT * workers):
                        done, future = waiting.popleft()
                        yield done, future.result()
                    if error is not None:
                        raise error
                while waiting:
                    done, future = waiting.popleft()
                    yield done, future.result()
            finally:
                # First, so that no thread waits for an answer any more.
                for process in processes:
                    process.kill()
                threads.shutdown(cancel_futures=True)
    finally:
        for process in processes:
            process.reap()


def _until_error(cuts: Iterable[Cut]) -> Iterator[tuple[Cut | None, Exception | None]]:
    try:
        for cut in cuts:
            yield cut, None
    except Exception as error:
        yield None, error


class _Worker:
    """A process that answers blocks with tokens, over its standard input and output."""

    def __init__(self, number: int, job: bytes) -> None:
        self._number = number
        # A plain process rather than a fork (threads may be running) or multiprocessing's spawn (which would import the
        # caller's main program anew). Of its own group, so that Ctrl-C is this process's alone to act on; it ends with
        # its input, whatever happens here.
        program = f"import sys; sys.path[:] = {sys.path!r}; from nmoe.data.workers import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        self._job: bytes | None = job

    def ask(self, block: Block) -> Tokenized:
        """The block's documents as tokens. Raises what tokenizing raises, and WorkerDiedError."""
        process = self._process
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        try:
            if self._job is not None:
                process.stdin.write(self._job)
                self._job = None
            pickle.dump(block, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._death() from error
        if isinstance(result, DataError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"worker {self._number} failed:\n{result}")
        return result

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()

    def reap(self) -> None:
        """Wait for the end, and free the pipes."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not read by the process that is gone
                    pipe.close()

    def _death(self) -> WorkerDiedError:
        code = self._process.wait()
        found = f"exit code {code}"
        if code < 0:
            try:
                found = signal.Signals(-code).name
            except ValueError:
                found = f"signal {-code}"
        hint = " (as the kernel ends a process when memory runs out)" if code == -signal.SIGKILL else ""
        return WorkerDiedError(
            f"worker {self._number} of prep",
            expected="it to tokenize until the end",
            found=f"it ended with {found}{hint}",
            remedy="Run the same command again: the work so far is kept. If memory ran out, use fewer --workers.",
        )


def serve() -> None:
    """A worker's whole life: reads the job and then blocks from standard input, answers each on standard output."""
    source = sys.stdin.buffer
    # What anything prints goes to standard error, not between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        tokenizer, digests = pickle.load(source)
        while True:
            _answer(pickle.load(source), tokenizer, digests, answers)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # whoever asked has finished, or is gone
    # Nothing is left to write, and an interpreter's tidying up could trip over the closed pipe.
    os._exit(0)


def _answer(block: Block, tokenizer: Tokenizer, digests: bool, answers: BinaryIO) -> None:
    result: Any
    try:
        result = tokenize(list(block.documents()), tokenizer, digests=digests)
    except DataError as error:
        result = error
    except MemoryError:
        raise
    except BaseException:  # tiktoken's panics are no Exception
        result = traceback.format_exc()
    pickle.dump(result, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()
