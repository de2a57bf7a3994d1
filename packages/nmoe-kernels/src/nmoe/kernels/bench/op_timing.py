"""Times of one op: several repeats in one CUDA graph, over copies of its tensors that together exceed the L2.

So neither the host's launches count nor what the L2 kept of the repeat before.
"""

import gc
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nmoe.kernels.bench.op_case import Make, Run, Setting, Work
from nmoe.kernels.bench.timing import Timing, captured, time_gpu

LEAST_GRAPH_MS = 2.0
"""Of a graph, by its bound: to start it, and to write back what `time_gpu` leaves in the L2, is below 1% of it."""
MOST_REPEATS = 256
MOST_COPIES = 64
L2_TIMES = 4
"""How often the copies' bytes fill the L2: it keeps part of what is only a little larger than itself."""
BITS_RUNS = 5
_COPY_BYTES = 2 << 30
_MATMUL = 8192
_RATE_REPEATS = 4


@dataclass(frozen=True)
class Rates:
    """What the GPU at hand reaches in this process."""

    copy_bytes_per_s: float
    """Read and written, of a large tensor that is copied with its sign turned."""
    matmul_flop_per_s: float
    """Of a large bf16 product of random numbers."""

    def bound_ms(self, work: Work) -> float:
        """The longer of moving and computing: the two may go on at once."""
        return 1e3 * max(work.bytes / self.copy_bytes_per_s, work.flop / self.matmul_flop_per_s)

    def bound_by(self, work: Work) -> str:
        """`bytes` or `flop`."""
        by_bytes = work.bytes / self.copy_bytes_per_s >= work.flop / self.matmul_flop_per_s
        return "bytes" if by_bytes else "flop"


def copies_of(work: Work, l2_bytes: int) -> int:
    """So many that all of them fill the L2 `L2_TIMES` times, and at most `MOST_COPIES`."""
    return min(MOST_COPIES, max(1, -(-L2_TIMES * l2_bytes // max(1, work.bytes))))


def repeats_of(copies: int, bound_ms: float) -> int:
    """Whole turns over the copies that take `LEAST_GRAPH_MS` by their bound, or come near `MOST_REPEATS`."""
    turns = -(-LEAST_GRAPH_MS // (copies * max(bound_ms, 1e-6)))
    return copies * max(1, min(MOST_REPEATS // copies, int(turns)))


def time_make(make: Make, setting: Setting, copies: int, repeats: int) -> Timing:
    """Median milliseconds of one repeat, and the graph's runs.

    Raises:
        Exception: whatever the op raises, or PyTorch's where it cannot be captured.
    """
    runs: list[Run] = []

    def run() -> deque[Any]:
        # Made at the first call, on the stream of the capture: a backward runs on its forward's stream.
        runs.extend(make(setting) for _ in range(0 if runs else copies))
        written: deque[Any] = deque(maxlen=copies)  # alive, so that outputs turn over as inputs do
        for repeat in range(repeats):
            written.append(runs[repeat % copies]())
        return written

    with captured(run) as graph:
        timing = time_gpu(graph.replay)
    return Timing(timing.median_ms / repeats, timing.runs)


def measure_rates(setting: Setting) -> Rates:
    """By a pass over 2 GiB and a product of 8192³."""
    copied = time_make(_copy, setting, 1, _RATE_REPEATS).median_ms
    multiplied = time_make(_multiply, setting, 1, _RATE_REPEATS).median_ms
    release()
    return Rates(2 * _COPY_BYTES / copied * 1e3, 2 * _MATMUL**3 / multiplied * 1e3)


def same_bits(make: Make, setting: Setting) -> bool:
    """Whether `BITS_RUNS` runs on the same inputs write the same bits."""
    run = make(setting)
    first = [_bits(tensor).clone() for tensor in _tensors(run())]
    for _ in range(BITS_RUNS - 1):
        if not all(torch.equal(one, _bits(other)) for one, other in zip(first, _tensors(run()), strict=True)):
            return False
    return True


def release() -> None:
    """Gives what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _copy(setting: Setting) -> Run:
    source = torch.ones(_COPY_BYTES // 4, device=setting.device)
    into = torch.empty_like(source)
    return lambda: torch.neg(source, out=into)  # by a kernel: a graph makes a slow memcpy node of a plain copy


def _multiply(setting: Setting) -> Run:
    a, b = (setting.normal(_MATMUL, _MATMUL) for _ in range(2))
    return lambda: a @ b


def _tensors(written: Any) -> Iterator[torch.Tensor]:
    if isinstance(written, torch.Tensor):
        yield written
    elif isinstance(written, (tuple, list)):
        for part in written:
            yield from _tensors(part)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: a NaN has the same bits as itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])
