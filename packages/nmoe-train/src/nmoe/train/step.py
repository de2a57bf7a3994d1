"""One optimizer step on the device: the gradients of its micro-batches, then one update. The host waits for nothing.

On a GPU the step is captured in CUDA graphs, three of them: the first micro-batch, whose gradients overwrite the last
step's; a later one, whose gradients are added, replayed for each; and the update. All that changes from step to step
lies in device memory before they run: tokens, learning rates, and `ok`.

`ok` is an int32 word, 1 until a loss or the gradient's norm is not finite and 0 ever after. The update asks it on the
device and then changes nothing; the host, which learns of it later, finds the state as the last good step left it.

Shapes: B micro-batch, S sequence, N all sequences of a step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from nmoe.model.transformer import Transformer
from nmoe.train.clock import Moment
from nmoe.train.gradients import Gradients, clip_factor
from nmoe.train.graphs import StepGraphs
from nmoe.train.health import health_tags, router_figures
from nmoe.train.optim import Optimizer
from nmoe.train.schedule import lr_factor
from nmoe.train.schema import TrainingConfig

Range = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class StepFigures:
    """What a step gave."""

    losses: tuple[tuple[float, float], ...]
    """Of each micro-batch its share of the next-token loss and of the total loss, nats a token."""
    grad_norm: float
    health: dict[str, float]
    """See `nmoe.train.health`."""

    @property
    def loss(self) -> float:
        """Next-token loss of the global batch, nats a token."""
        return sum(next_token for next_token, _ in self.losses)

    @property
    def total_loss(self) -> float:
        """What was differentiated."""
        return sum(total for _, total in self.losses)


class LaunchedStep:
    """A step that the device has been told to make."""

    def __init__(
        self, step: int, cursor: int, sample_NS1: torch.Tensor, lr_factor: float, figures: torch.Tensor, n_losses: int
    ) -> None:
        self.step, self.cursor, self.sample_NS1, self.lr_factor = step, cursor, sample_NS1, lr_factor
        self._n_losses = n_losses
        self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=figures.is_cuda)
        self._figures.copy_(figures, non_blocking=True)
        self.ended = Moment(figures.device)

    def wait(self, model: Transformer) -> StepFigures:
        """Returns once the step has been made, without waiting for what the device was told later."""
        self.ended.wait()
        values = self._figures.tolist()
        flat, rest = values[: 2 * self._n_losses], values[2 * self._n_losses :]
        losses = tuple(zip(flat[::2], flat[1::2], strict=True))
        return StepFigures(losses, rest[0], health_tags(model, rest[1:]))


class TrainStep:
    """Makes steps of one model. On a GPU all of it must happen on one stream that is not the default one."""

    def __init__(
        self, model: Transformer, gradients: Gradients, optimizer: Optimizer, config: TrainingConfig, *, graph: bool
    ) -> None:
        self.model, self.gradients, self.optimizer, self.config = model, gradients, optimizer, config
        device, train = model.head.weight.device, config.train
        self._n_micro = train.batch_size // train.micro_batch_size
        self._token_BS1 = torch.zeros(train.micro_batch_size, train.seq_len + 1, dtype=torch.int64, device=device)
        self._loss_2 = torch.zeros(2, device=device)
        self._figures = torch.zeros(2 * self._n_micro + 1 + router_figures(model).numel(), device=device)
        self._ok = torch.ones((), dtype=torch.int32, device=device)
        self._graphs = StepGraphs() if graph else None

    def launch(self, step: int, cursor: int, sample_NS1: torch.Tensor, within: Range) -> LaunchedStep:
        """Tells the device to make a step.

        Args:
            step: its number, from 1.
            cursor: global index of its first sample.
            sample_NS1: the global batch's samples of S + 1 tokens, in host memory.
            within: names a part of the step in a trace; within a captured piece, only while it is captured.
        """
        if self._token_BS1.is_cuda:
            sample_NS1 = sample_NS1.pin_memory()
        factor = lr_factor(self.config.schedule, step, self.config.tokens_per_step)
        self.optimizer.set_step(step=step, lr_factor=factor)
        self._accumulate(sample_NS1, within)
        with within("update"):
            self._run("update", self._update)
        if self._graphs is not None:
            self._graphs.warm()
            self.gradients.replayed()
        return LaunchedStep(step, cursor, sample_NS1, factor, self._figures, self._n_micro)

    def not_finite(self, launched: LaunchedStep) -> list[str]:
        """Names of the parameters whose gradients a refused step made NaN or infinite: they are computed again, from
        the weights that it left untouched."""
        self.release()
        self._accumulate(launched.sample_NS1, nullcontext)
        return self.gradients.not_finite()

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Evaluations in this block use the step's own memory, which is free between steps."""
        with nullcontext() if self._graphs is None else self._graphs.memory():
            yield

    def release(self) -> None:
        """Gives back what the step keeps for the next one."""
        if self._graphs is not None:
            self._graphs.release()

    def _accumulate(self, sample_NS1: torch.Tensor, within: Range) -> None:
        self.gradients.zero()
        for i, micro_batch in enumerate(sample_NS1.split(self.config.train.micro_batch_size)):
            self._token_BS1.copy_(micro_batch, non_blocking=True)
            with within("gradients"):
                self._run("first" if i == 0 else "later", lambda: self._differentiate(within))
            self._figures[2 * i : 2 * i + 2].copy_(self._loss_2)

    def _differentiate(self, within: Range) -> None:
        with within("forward"):
            loss = self.model.training_loss(
                self._token_BS1, self.config.tokens_per_step, recompute=self.config.recomputed_layers
            )
        with within("backward"):
            loss.total.backward()
        self._loss_2.copy_(torch.stack((loss.next_token, loss.total.detach())))

    def _update(self) -> None:
        norm = self.gradients.norm()
        self._figures[2 * self._n_micro].copy_(norm)
        self._ok.mul_(torch.isfinite(self._figures[: 2 * self._n_micro + 1]).all())
        self._figures[2 * self._n_micro + 1 :].copy_(router_figures(self.model).flatten())
        scale = clip_factor(norm, self.config.optim.clip_grad_norm)
        self.optimizer.step(self.gradients, grad_scale=scale, ok=self._ok)
        for _, router in self.model.routers():
            router.update_bias(self._ok)

    def _run(self, name: str, piece: Callable[[], None]) -> None:
        if self._graphs is None:
            piece()
        else:
            self._graphs.run(name, piece)
