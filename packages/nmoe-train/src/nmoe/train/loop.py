"""The training loop. It reads from top to bottom: build, restore, step, record, save, evaluate, end."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from nmoe.kernels.arch import device_limits
from nmoe.kernels.ops import select_ops
from nmoe.model.checkpoint import TensorFolder
from nmoe.model.count import flops_per_token
from nmoe.model.transformer import Transformer
from nmoe.rdep.transport import open_transport
from nmoe.train.checkpointer import Checkpointer
from nmoe.train.errors import NonFiniteError
from nmoe.train.gradients import Gradients, clip_factor
from nmoe.train.health import router_health
from nmoe.train.metrics import MetricsWriter, read_metrics
from nmoe.train.optim import Optimizer
from nmoe.train.profile import StepProfiler
from nmoe.train.protocols import BatchSource, Evaluate, Reporter, RunStart, StepReport
from nmoe.train.run_folder import RunFolder
from nmoe.train.schedule import lr_factor
from nmoe.train.schema import TrainConfig, TrainingConfig
from nmoe.train.signals import StopSignal
from nmoe.train.state import TrainState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        evaluate: measures the model; None for no evaluation.
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
    parameters = dict(model.named_parameters())
    gradients = Gradients(parameters.items())
    optimizer = Optimizer(parameters, config.optim, ops)
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
    clock = _Clock(config, device, state.step)
    loss_value: float | None = None
    evaluation: Mapping[str, float] = {}
    saved_at = state.step if resume is not None else None

    def evaluates_at(step: int) -> bool:
        return evaluate is not None and (step == settings.steps or _is_due(step, evaluate_every))

    with _finishing(checkpointer), closing(reporter), closing(metrics), StopSignal() as stop:
        description = _describe(config, device)
        reporter.start(RunStart(run.run_id, run.path, settings.steps, state.step, config.tokens_per_step, description))
        if evaluate is not None and resume is not None and evaluates_at(state.step) and not _was_evaluated(run, state):
            evaluation = _evaluate(model, evaluate, state.step, metrics, reporter)  # a kill had come between
        with profiler:
            while state.step < settings.steps and not _reached(settings, evaluation) and stop.received is None:
                # ---- one step: gradients over the micro-batches, then one update -------------------------------------
                step = state.step + 1
                gradients.zero()
                losses = []
                with profiler.range("batch"):
                    sample_BS1 = torch.from_numpy(batches.batch(state.cursor, settings.batch_size))
                for micro_batch in sample_BS1.split(settings.micro_batch_size):
                    with profiler.range("forward"):
                        loss = model.training_loss(micro_batch.to(device), config.tokens_per_step)
                    with profiler.range("backward"):
                        loss.total.backward()
                    losses.append(torch.stack((loss.next_token, loss.total.detach())))
                with profiler.range("update"):
                    norm = gradients.norm()
                    sums = torch.stack(losses)
                    figures = torch.cat((sums.flatten(), norm.to(sums.dtype)[None])).tolist()
                    _refuse_non_finite(step, state.cursor, settings.micro_batch_size, figures, gradients)
                    factor = lr_factor(config.schedule, step, config.tokens_per_step)
                    scale = clip_factor(norm, config.optim.clip_grad_norm)
                    optimizer.step(gradients.by_name, step=step, lr_factor=factor, grad_scale=scale)
                    health = router_health(model) if step % config.metrics.every == 0 else {}
                    for _, router in model.routers():
                        router.update_bias()
                state.step, state.cursor = step, state.cursor + settings.batch_size
                loss_value = sum(figures[0:-1:2])
                clock.lap()
                profiler.step(step)

                # ---- record ------------------------------------------------------------------------------------------
                if step % config.metrics.every == 0 or step == settings.steps:
                    worst = [value for tag, value in health.items() if tag.endswith("max_over_mean")]
                    report = StepReport(
                        step=step,
                        steps=settings.steps,
                        loss=loss_value,
                        lr=config.optim.lr_dense * factor,
                        grad_norm=figures[-1],
                        load_max_over_mean=max(worst) if worst else None,
                        **clock.figures(step, settings.steps),
                    )
                    metrics.write(step, {**_tags(report), "train/total_loss": sum(figures[1:-1:2]), **health})
                    reporter.step(report)
                _tell_failures(checkpointer, reporter)

                # ---- save, then evaluate: an evaluation never costs a step -------------------------------------------
                due = step == settings.steps or evaluates_at(step) or _is_due(step, config.checkpoint.every)
                if config.checkpoint.enabled and due:
                    checkpointer.save(step, state.tensors(), state.documents())
                    saved_at = step
                    reporter.checkpoint(step, checkpointer.path(step))
                if evaluate is not None and evaluates_at(step):
                    evaluation = _evaluate(model, evaluate, step, metrics, reporter)
                if due:
                    clock.skip()

        # ---- end -----------------------------------------------------------------------------------------------------
        if config.checkpoint.enabled and saved_at != state.step and state.step > 0:
            checkpointer.save(state.step, state.tensors(), state.documents())
            reporter.checkpoint(state.step, checkpointer.path(state.step))
        try:
            checkpointer.wait()
        finally:
            _tell_failures(checkpointer, reporter)
        if stop.received is not None and state.step < settings.steps and not _reached(settings, evaluation):
            return Outcome("interrupted", state.step, loss_value, evaluation, int(stop.received))
        if profile is not None:
            recorded = profiler.recorded
            reporter.message(
                "None of the steps to profile was made"
                if recorded is None
                else f"The trace of steps {recorded[0]} to {recorded[1]} is {profiler.path}"
            )
        if at_end is not None:
            model.eval()
            at_end(model)
    status: Status = "target_reached" if _reached(settings, evaluation) else "finished"
    return Outcome(status, state.step, loss_value, evaluation)


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


def _refuse_non_finite(
    step: int, cursor: int, micro_batch_size: int, figures: list[float], gradients: Gradients
) -> None:
    """`figures`: next-token and total loss of each micro-batch, then the gradient norm."""
    finite = torch.isfinite(torch.tensor(figures)).tolist()
    if all(finite):
        return
    for i, index in enumerate(range(0, len(figures) - 1, 2)):
        if not (finite[index] and finite[index + 1]):
            first = cursor + i * micro_batch_size
            samples = f"samples {first} to {first + micro_batch_size - 1}"
            raise NonFiniteError(step, "the loss", f"micro-batch {i}, {samples}")
    names = gradients.not_finite()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise NonFiniteError(step, "the gradient", f"of {shown}" if names else "its norm overflows")


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


class _Clock:
    """Times steps, without checkpoints and evaluations, and derives rates."""

    def __init__(self, config: TrainingConfig, device: torch.device, first_step: int) -> None:
        self.device, self.tokens = device, config.tokens_per_step
        self.flops = flops_per_token(config.model, config.train.seq_len) * self.tokens
        self.peak = _peak_flops(device) * config.runtime.world_size if config.runtime.precision == "bf16" else 0.0
        self.begun = self.mark = time.perf_counter()
        self.first_step, self.seconds, self.total = first_step, 0.0, 0.0

    def lap(self) -> None:
        """A step has ended; it began with the lap before, or with the last `skip`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds, self.mark = now - self.mark, now
        self.total += self.seconds

    def skip(self) -> None:
        """What was done since the last lap, checkpoints and evaluations, belongs to no step."""
        self.mark = time.perf_counter()

    def figures(self, step: int, steps: int) -> dict[str, Any]:
        """The fields of a `StepReport` that are about time and room."""
        mean = self.total / (step - self.first_step)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident_bytes()
        return {
            "ms": self.seconds * 1e3,
            "tokens_per_s": self.tokens / self.seconds,
            "mfu": self.flops / self.seconds / self.peak if self.peak else None,
            "elapsed_s": time.perf_counter() - self.begun,
            "eta_s": mean * (steps - step),
            "memory_bytes": memory,
        }


def _peak_flops(device: torch.device) -> float:
    """Published bf16 FLOP/s of the device; 0 where they are not known."""
    limits = device_limits(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return 0.0 if limits is None else limits.bf16_flops


def _resident_bytes() -> int | None:
    """Resident memory of this process, where the system says it in /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return None
