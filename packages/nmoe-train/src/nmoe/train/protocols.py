"""What the trainer needs of others: a batch source, an evaluation, a reporter. The cli passes the real ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from nmoe.model.transformer import Transformer

Evaluate = Callable[["Transformer"], Mapping[str, float]]
"""Measures a model: tags such as `val/loss` (nats a token) and `val/bpb` (bits a byte) to values.

On a GPU it computes in the step's own memory: no tensor on the device that it makes may be used after it has returned.
"""


class BatchSource(Protocol):
    """Samples in one global order that depends neither on ranks nor on micro-batches."""

    def batch(self, cursor: int, count: int) -> "np.ndarray":
        """Global samples `cursor` to `cursor + count - 1` as int64 (count, S + 1)."""
        ...


class Documents(Protocol):
    """What of samples is hidden from attention and from the loss, as their documents have it. Pure functions."""

    def starts(self, sample_NS1: "np.ndarray") -> "np.ndarray | None":
        """For each input position the first position of its document, int32 (N, S); None, always: nothing is hidden."""
        ...

    def targets(self, sample_NS1: "np.ndarray") -> "np.ndarray | None":
        """int64 (N, S) with -100 for what is not to be predicted; None, always: every token is."""
        ...


@dataclass(frozen=True)
class RunStart:
    """What is known before the first step."""

    run_id: str
    path: Path
    steps: int
    start_step: int
    tokens_per_step: int
    description: str


@dataclass(frozen=True)
class StepReport:
    """One recorded optimizer step."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    ms: float
    tokens_per_s: float
    mfu: float | None
    load_max_over_mean: float | None
    elapsed_s: float
    eta_s: float
    memory_bytes: int | None


class Reporter(Protocol):
    """Shows a run to a person."""

    def start(self, run: RunStart) -> None:
        """The run begins or resumes."""

    def step(self, report: StepReport) -> None:
        """A step was recorded."""

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation ended."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint began to be written."""

    def message(self, text: str) -> None:
        """Something a person should read now."""

    def close(self) -> None:
        """The run ended, well or not."""
