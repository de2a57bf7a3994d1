"""The training loop. It reads from top to bottom: build, restore, step, record, save, evaluate, end."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from nmoe.kernels.arch import detect_arch
from nmoe.kernels.ops import select_ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import open_transport
from nmoe.train.checkpointer import Checkpointer
from nmoe.train.clock import Clock
from nmoe.train.errors import NonFiniteError
from nmoe.train.gradients import Gradients
from nmoe.train.metrics import MetricsWriter, read_metrics
from nmoe.train.optim import Optimizer, flatten
from nmoe.train.profile import StepProfiler
from nmoe.train.protocols import BatchSource, Evaluate, Reporter, RunStart, StepReport
from nmoe.train.run_folder import RunFolder
from nmoe.train.schema import TrainConfig, TrainingConfig
from nmoe.train.signals import StopSignal
from nmoe.train.state import TrainState
from nmoe.train.step import LaunchedStep, StepFigures, TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS_LATE = {"cpu": 0, "cuda": 1}
"""How many steps behind the device the host reads what they gave."""

Parameters = ParamSpec("Parameters")

Status = Literal["finished", "target_reached", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Status
    step: int
    loss: float | None
    """The last recorded training loss, nats a token; None if no step was made."""
    evaluation: Mapping[str, float]
    """The last evaluation's values; empty if there was none."""
    signal: int | None = None
    """The signal's number, if one ended the run."""


def _on_own_stream(
    function: Callable[Concatenate[TrainingConfig, Parameters], Outcome],
) -> Callable[Concatenate[TrainingConfig, Parameters], Outcome]:
    """On a GPU, everything on one stream that is not the default one: CUDA graphs cannot be captured there, and memory
    that was used on one stream does not serve another."""

    @wraps(function)
    def on_own_stream(config: TrainingConfig, *args: Parameters.args, **options: Parameters.kwargs) -> Outcome:
        if config.runtime.device != "cuda":
            return function(config, *args, **options)
        detect_arch("cuda")  # says what is wrong with the GPU, before anything asks for one
        with torch.cuda.stream(torch.cuda.Stream()):
            return function(config, *args, **options)

    return on_own_stream


@_on_own_stream
def train(
    config: TrainingConfig,
    *,
    run: RunFolder,
    batches: BatchSource,
    identity: Mapping[str, Any],
    reporter: Reporter,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    resume: TensorFolder | None = None,
    start_from: TensorFolder | None = None,
    labels: Mapping[str, Any] = MappingProxyType({}),
    at_end: Callable[[Transformer], None] | None = None,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Trains until `train.steps`, the target loss, or a signal.

    Args:
        config: everything that decides the computation.
        run: where metrics and checkpoints go.
        batches: samples by global index.
        identity: saved with each checkpoint and compared at resume.
        reporter: shows progress to a person.
        evaluate: measures the model; None for no evaluation. See `nmoe.train.protocols.Evaluate`.
        evaluate_every: steps between evaluations; None for one after the last step.
        resume: a checkpoint of this run to continue.
        start_from: another run's checkpoint whose weights this run starts with.
        labels: JSON documents to save with each checkpoint, such as the tokenizer's name.
        at_end: called with the trained model, in evaluation mode, once its last checkpoint is on disk.
        profile: first and last step of a profiler trace.

    Raises:
        NonFiniteError: a loss or gradient was NaN or infinite; the weights are untouched by that step.
        IdentityMismatchError: `resume` was made under other settings.
        WeightsMismatchError: `start_from` holds another model.
        UnsupportedArchError, TransportUnavailableError: the machine cannot run what was asked for.
    """
    # ---- build -------------------------------------------------------------------------------------------------------
    settings, runtime = config.train, config.runtime
    device = torch.device(runtime.device)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    torch.manual_seed(runtime.seed)
    ops = select_ops(runtime.kernels, device)
    transport = open_transport(config.rdep, runtime.world_size)
    model = Transformer.build(
        config.model,
        ops,
        transport,
        device=device,
        dtype=DTYPES[runtime.precision],
        seed=runtime.seed if resume is None and start_from is None else None,
    )
    model.train()
    flat = flatten(dict(model.named_parameters()), config.optim)
    gradients = Gradients(flat, ops)
    optimizer = Optimizer(flat, config.optim, ops)
    state = TrainState(model, optimizer, identity, labels)

    # ---- restore -----------------------------------------------------------------------------------------------------
    if resume is not None:
        state.restore(resume)
    elif start_from is not None:
        state.start_from(start_from)
    metrics = MetricsWriter(run.metrics, compact_every=config.metrics.compact_every)
    metrics.drop_after(state.step)
    checkpointer = Checkpointer(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every)
    checkpointer.drop_after(state.step)
    profiler = StepProfiler(profile, run.path / "profile", device, first_step=state.step + 1)
    train_step = TrainStep(model, gradients, optimizer, config, graph=runtime.uses_cuda_graph)
    recorder = _Recorder(config, train_step, Clock(config, device, state.step), metrics, reporter)
    evaluation: Mapping[str, float] = {}
    saved_at = state.step if resume is not None else None

    def evaluates_at(step: int) -> bool:
        return evaluate is not None and (step == settings.steps or _is_due(step, evaluate_every))

    def measure() -> Mapping[str, float]:
        assert evaluate is not None, "there is no evaluation without a function that measures"
        with train_step.memory():
            return _evaluate(model, evaluate, state.step, metrics, reporter)

    with _finishing(checkpointer), closing(reporter), closing(metrics), StopSignal() as stop:
        description = _describe(config, device)
        reporter.start(RunStart(run.run_id, run.path, settings.steps, state.step, config.tokens_per_step, description))
        if evaluate is not None and resume is not None and evaluates_at(state.step) and not _was_evaluated(run, state):
            evaluation = measure()  # a kill had come between
            recorder.clock.skip()
        with profiler:
            while state.step < settings.steps and not _reached(settings, evaluation) and stop.received is None:
                # ---- one step, and the record of the one before ------------------------------------------------------
                step = state.step + 1
                with profiler.range("batch"):
                    sample_NS1 = torch.from_numpy(batches.batch(state.cursor, settings.batch_size))
                recorder.add(train_step.launch(step, state.cursor, sample_NS1, profiler.range))
                state.step, state.cursor = step, state.cursor + settings.batch_size
                profiler.step(step)
                _tell_failures(checkpointer, reporter)

                # ---- save, then evaluate: an evaluation never costs a step -------------------------------------------
                due = step == settings.steps or evaluates_at(step) or _is_due(step, config.checkpoint.every)
                if due:
                    recorder.finish()
                if config.checkpoint.enabled and due:
                    checkpointer.save(step, state.tensors(), state.documents())
                    saved_at = step
                    reporter.checkpoint(step, checkpointer.path(step))
                if evaluates_at(step):
                    evaluation = measure()
                if due:
                    recorder.clock.skip()

        # ---- end -----------------------------------------------------------------------------------------------------
        recorder.finish()
        if config.checkpoint.enabled and saved_at != state.step and state.step > 0:
            checkpointer.save(state.step, state.tensors(), state.documents())
            reporter.checkpoint(state.step, checkpointer.path(state.step))
        try:
            checkpointer.wait()
        finally:
            _tell_failures(checkpointer, reporter)
        if stop.received is not None and state.step < settings.steps and not _reached(settings, evaluation):
            return Outcome("interrupted", state.step, recorder.loss, evaluation, int(stop.received))
        if profile is not None:
            recorded = profiler.recorded
            reporter.message(
                "None of the steps to profile was made"
                if recorded is None
                else f"The trace of steps {recorded[0]} to {recorded[1]} is {profiler.path}"
            )
        if at_end is not None:
            train_step.release()
            model.eval()
            at_end(model)
    status: Status = "target_reached" if _reached(settings, evaluation) else "finished"
    return Outcome(status, state.step, recorder.loss, evaluation)


class _Recorder:
    """Reads what steps gave, a step late on a GPU, which is never idle for it, and tells metrics and reporter."""

    def __init__(
        self, config: TrainingConfig, train_step: TrainStep, clock: Clock, metrics: MetricsWriter, reporter: Reporter
    ) -> None:
        self.config, self.train_step, self.clock = config, train_step, clock
        self.metrics, self.reporter = metrics, reporter
        self.loss: float | None = None
        """The last recorded training loss."""
        self._late = STEPS_LATE[config.runtime.device]
        self._launched: deque[LaunchedStep] = deque()

    def add(self, launched: LaunchedStep) -> None:
        """Takes a step that was just launched, and records the one that is late enough.

        Raises:
            NonFiniteError: that step was not applied, nor was any after it.
        """
        self._launched.append(launched)
        while len(self._launched) > self._late:
            self._record(self._launched.popleft())

    def finish(self) -> None:
        """Records all: every step launched has been applied.

        Raises:
            NonFiniteError: as `add`.
        """
        while self._launched:
            self._record(self._launched.popleft())

    def _record(self, launched: LaunchedStep) -> None:
        figures = launched.wait(self.train_step.model)
        self.clock.lap(launched.ended)
        self._refuse_non_finite(launched, figures)
        self.loss = figures.loss
        step, steps = launched.step, self.config.train.steps
        if step % self.config.metrics.every and step != steps:
            return
        worst = [value for tag, value in figures.health.items() if tag.endswith("max_over_mean")]
        report = StepReport(
            step=step,
            steps=steps,
            loss=figures.loss,
            lr=self.config.optim.lr_dense * launched.lr_factor,
            grad_norm=figures.grad_norm,
            load_max_over_mean=max(worst) if worst else None,
            **self.clock.figures(step, steps),
        )
        self.metrics.write(step, {**_tags(report), "train/total_loss": figures.total_loss, **figures.health})
        self.reporter.step(report)

    def _refuse_non_finite(self, launched: LaunchedStep, figures: StepFigures) -> None:
        size = self.config.train.micro_batch_size
        for i, losses in enumerate(figures.losses):
            if not all(map(math.isfinite, losses)):
                first = launched.cursor + i * size
                where = f"micro-batch {i}, samples {first} to {first + size - 1}"
                raise NonFiniteError(launched.step, "the loss", where)
        if math.isfinite(figures.grad_norm):
            return
        names = self.train_step.not_finite(launched)
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise NonFiniteError(launched.step, "the gradient", f"of {shown}" if names else "its norm overflows")


@contextmanager
def _finishing(checkpointer: Checkpointer) -> Iterator[None]:
    """However the block ends, nothing is being written after it: the run's lock must outlive the write."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error that ended the block is the one to tell
            checkpointer.wait()
        raise


def _tell_failures(checkpointer: Checkpointer, reporter: Reporter) -> None:
    while (failure := checkpointer.failure()) is not None:
        reporter.message(f"A checkpoint could not be written: {failure}")


def _reached(settings: TrainConfig, evaluation: Mapping[str, float]) -> bool:
    return settings.target_loss is not None and evaluation.get("val/loss", float("inf")) <= settings.target_loss


def _was_evaluated(run: RunFolder, state: TrainState) -> bool:
    rows = read_metrics(run.metrics, tags=["val/loss"])
    return state.step in rows.column("step").to_pylist()


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(
    model: Transformer, evaluate: Evaluate, step: int, metrics: MetricsWriter, reporter: Reporter
) -> Mapping[str, float]:
    model.eval()
    try:
        with torch.no_grad():
            values = evaluate(model)
    except Exception as error:  # whatever failed, the run's own work is worth more than a measurement
        reporter.message(f"step {step}: the evaluation failed and training goes on: {type(error).__name__}: {error}")
        return {}
    finally:
        model.train()
    metrics.write(step, values)
    reporter.evaluation(step, values)
    return values


def _tags(report: StepReport) -> dict[str, float]:
    tags = {
        "train/loss": report.loss,
        "train/lr": report.lr,
        "train/grad_norm": report.grad_norm,
        "perf/ms_step": report.ms,
        "perf/tokens_per_s": report.tokens_per_s,
        "perf/mfu": report.mfu,
        "perf/memory_bytes": None if report.memory_bytes is None else float(report.memory_bytes),
    }
    return {tag: value for tag, value in tags.items() if value is not None}


def _describe(config: TrainingConfig, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, {config.runtime.precision}, {config.runtime.kernels} kernels"
