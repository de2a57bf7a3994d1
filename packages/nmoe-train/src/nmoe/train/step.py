"""One optimizer step on the device: the gradients of its micro-batches, then one update. The host waits for nothing.

On a GPU the step is captured in CUDA graphs, three of them: the first micro-batch, whose gradients overwrite the last
step's; a later one, whose gradients are added, replayed for each; and the update. All that changes from step to step
lies in device memory before they run: tokens, documents, learning rates, and `ok`.

`ok` is an int32 word, the same on all ranks, 1 until a loss or the gradient's norm is not finite, gradients have other
bits when they are computed again, or something goes wrong between ranks, and 0 ever after. The update asks it on the
device and then changes nothing; the host, which learns of it later, finds the state as the last good step left it.

Shapes: those of `nmoe.train.batches`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import Transport
from nmoe.train.batches import StepBatch
from nmoe.train.clock import Moment
from nmoe.train.errors import NotReproducibleError
from nmoe.train.figures import FigureBoard, StepFigures
from nmoe.train.gradients import Gradients, clip_factor
from nmoe.train.graphs import StepGraphs
from nmoe.train.optim import Optimizer
from nmoe.train.schedule import lr_factor
from nmoe.train.schema import TrainingConfig

Range = Callable[[str], AbstractContextManager[Any]]


class LaunchedStep:
    """A step that the device has been told to make."""

    def __init__(
        self,
        step: int,
        cursor: int,
        batch: StepBatch,
        lr_factor: float,
        board: FigureBoard,
        differ: torch.Tensor | None = None,
    ) -> None:
        self.step, self.cursor, self.batch, self.lr_factor = step, cursor, batch, lr_factor
        self.differ = differ
        """Of a verified step: the parameters whose gradients had other bits the second time."""
        self._board = board
        self._figures = torch.empty(board.told.shape, dtype=board.told.dtype, pin_memory=board.told.is_cuda)
        self._figures.copy_(board.told, non_blocking=True)
        self.ended = Moment(board.told.device)

    def wait(self, check: Callable[[], None] | None = None) -> StepFigures:
        """Returns once the step has been made, whatever the device was told later. For `check` see `Moment.wait`."""
        self.ended.wait(check)
        return self._board.read(self._figures.tolist())


class TrainStep:
    """Makes steps of one model, all ranks together. On a GPU all of it must happen on one stream that is not the
    default one."""

    def __init__(
        self,
        model: Transformer,
        gradients: Gradients,
        optimizer: Optimizer,
        config: TrainingConfig,
        transport: Transport,
        *,
        graph: bool,
    ) -> None:
        self.model, self.gradients, self.optimizer, self.config = model, gradients, optimizer, config
        self._world = transport.world
        device, train = model.head.weight.device, config.train
        self._micro_batch: StepBatch | None = None
        self._n_targets = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_2 = torch.zeros(2, device=device)
        n_micro = train.batch_size // (train.micro_batch_size * self._world.size)
        self._board = FigureBoard(model, n_micro, self._world, transport.faults.healthy)
        self._ok = torch.ones((), dtype=torch.int32, device=device)
        self._graphs = StepGraphs() if graph else None

    def launch(
        self, step: int, cursor: int, batch: StepBatch, within: Range, *, signal: int | None = None
    ) -> LaunchedStep:
        """Tells the device to make a step.

        Args:
            step: its number, from 1.
            cursor: global index of the global batch's first sample.
            batch: this rank's samples: its micro-batches one after the other. Every step's has the same tensors.
            within: names a part of the step in a trace; within a captured piece, only while it is captured.
            signal: the number of a signal that this rank has got, for all ranks to learn.
        """
        factor = lr_factor(self.config.schedule, step, self.config.tokens_per_step)
        self.optimizer.set_step(step=step, lr_factor=factor)
        self._board.begin(signal)
        self._accumulate(batch, within)
        every = self.config.train.verify_every
        differ = self._verify(batch) if every is not None and step % every == 0 else None
        if every is not None:
            self._board.put_differing(None if differ is None else differ.any())
        with within("update"):
            self._run("update", self._update)
        if self._graphs is not None:
            self._graphs.warm()
            self.gradients.replayed()
        return LaunchedStep(step, cursor, batch, factor, self._board, differ)

    def not_finite(self, launched: LaunchedStep) -> list[str]:
        """Names of the parameters whose gradients a refused step made NaN or infinite: they are computed again, from
        the weights that it left untouched. All ranks compute and tell them together."""
        self.release()
        self._accumulate(launched.batch, nullcontext)
        names = json.dumps(self.gradients.not_finite()).encode()
        told = self._world.share(f"not finite in step {launched.step}", names)
        return list(dict.fromkeys(name for of_rank in told for name in json.loads(of_rank)))

    def not_reproducible(self, launched: LaunchedStep) -> NotReproducibleError:
        """What a step found that was verified and refused. All ranks tell one another together."""
        assert launched.differ is not None, "a step that was not verified found nothing"
        own = bytes(launched.differ.cpu().tolist())
        told = self._world.share(f"gradients of step {launched.step}, again", own)
        ranks = [rank for rank, of_rank in enumerate(told) if any(of_rank)]
        names = [name for name, *found in zip(self.gradients.parts, *told, strict=True) if any(found)]
        return NotReproducibleError(launched.step, names[::-1], ranks)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Evaluations in this block use the step's own memory, which is free between steps."""
        with nullcontext() if self._graphs is None else self._graphs.memory():
            yield

    def release(self) -> None:
        """Gives back what the step keeps for the next one."""
        if self._graphs is not None:
            self._graphs.release()

    def _accumulate(self, batch: StepBatch, within: Range) -> None:
        self.gradients.zero()
        size = self.config.train.micro_batch_size
        if self._micro_batch is None:
            self._micro_batch = batch.buffers(size, self._n_targets.device)
        if batch.n_targets is not None:
            self._n_targets.fill_(batch.n_targets)
            self._world.sum_(self._n_targets)
            self._n_targets.clamp_(min=1)
        for i, micro_batch in enumerate(batch.micro_batches(size)):
            self._micro_batch.copy_(micro_batch)
            first, differentiate = i == 0, partial(self._differentiate, self._micro_batch, within, first=i == 0)
            with within("gradients"):
                self._run("first" if first else "later", differentiate)
            self._board.put_losses(i, self._loss_2)

    def _verify(self, batch: StepBatch) -> torch.Tensor:
        """Computes the gradients again. The parameters, in order, of which they had other bits, on the device."""
        loads = [(router.load, router.load.clone()) for _, router in self.model.routers()]
        bits = self.gradients.bits()
        differ = torch.zeros_like(bits, dtype=torch.bool)
        for _ in range(self.config.train.verify_times):
            self._accumulate(batch, nullcontext)
            if self._graphs is not None and self._graphs.replays:
                self.gradients.replayed()
            differ |= self.gradients.bits() != bits
        for load, before in loads:
            load.copy_(before)
        return differ

    def _differentiate(self, micro_batch: StepBatch, within: Range, *, first: bool) -> None:
        with within("forward"):
            loss = self.model.training_loss(
                micro_batch.sample_NS1,
                self.config.tokens_per_step,
                document_start_BS=micro_batch.document_start_NS,
                target_BS=micro_batch.target_NS,
                n_targets=None if micro_batch.n_targets is None else self._n_targets,
                recompute=self.config.recomputed_layers,
            )
        with within("backward"), self.gradients.micro_batch(first=first):
            loss.total.backward()
        self._loss_2.copy_(torch.stack((loss.next_token, loss.total.detach())))

    def _update(self) -> None:
        norm = self._board.exchange(self.gradients.norm(), self._ok)
        scale = clip_factor(norm, self.config.optim.clip_grad_norm)
        self.optimizer.step(self.gradients, grad_scale=scale, ok=self._ok)
        for _, router in self.model.routers():
            router.update_bias(self._ok)

    def _run(self, name: str, piece: Callable[[], None]) -> None:
        if self._graphs is None:
            piece()
        else:
            self._graphs.run(name, piece)
