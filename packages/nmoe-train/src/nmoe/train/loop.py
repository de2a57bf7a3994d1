"""The training loop. It reads from top to bottom: build, restore, step, record, save, evaluate, end."""

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
from nmoe.rdep.transport import Transport, open_transport
from nmoe.rdep.world import World, alone
from nmoe.train.batches import Batches
from nmoe.train.checkpointer import Checkpointer
from nmoe.train.clock import Clock
from nmoe.train.errors import PeerFaultError, WorldSizeError
from nmoe.train.gradients import Gradients
from nmoe.train.metrics import MetricsWriter, NoMetrics, read_metrics
from nmoe.train.optim import Optimizer, flatten
from nmoe.train.profile import StepProfiler
from nmoe.train.protocols import BatchSource, Documents, Evaluate, Reporter, RunStart
from nmoe.train.recorder import Recorder
from nmoe.train.run_folder import RunFolder
from nmoe.train.schedule import schedule_mismatch
from nmoe.train.schema import TrainConfig, TrainingConfig
from nmoe.train.signals import StopSignal
from nmoe.train.state import TrainState
from nmoe.train.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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
        with torch.cuda.stream(torch.cuda.Stream()):  # of the current device, which a world's is
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
    documents: Documents | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    resume: TensorFolder | None = None,
    start_from: TensorFolder | None = None,
    labels: Mapping[str, Any] = MappingProxyType({}),
    at_end: Callable[[Transformer], None] | None = None,
    profile: tuple[int, int] | None = None,
    world: World | None = None,
) -> Outcome:
    """Trains until `train.steps`, the target loss, or a signal. All ranks of a world call it alike, and it ends on all
    at the same step, in the same way.

    Args:
        config: everything that decides the computation.
        run: where metrics and checkpoints go.
        batches: samples by global index.
        identity: saved with each checkpoint and compared at resume.
        reporter: shows progress to a person; on ranks other than 0, one that says nothing.
        documents: hides parts of samples from attention and the loss; None: nothing is hidden.
        evaluate: measures the model; None for no evaluation. See `nmoe.train.protocols.Evaluate`. Several ranks call it
            all together, and it gives the same values on all; if it fails there, the run ends.
        evaluate_every: steps between evaluations; None for one after the last step.
        resume: a checkpoint of this run to continue.
        start_from: another run's checkpoint whose weights this run starts with.
        labels: JSON documents to save with each checkpoint, such as the tokenizer's name.
        at_end: called with the trained model, in evaluation mode, once its last checkpoint is on disk; on all ranks,
            whose calls of the model must be as many, and alike.
        profile: first and last step of a profiler trace, of rank 0.
        world: the ranks, `runtime.world_size` of them; None: this one alone.

    Raises:
        NonFiniteError: a loss or gradient was NaN or infinite; the weights are untouched by that step.
        NotReproducibleError: gradients that were computed again had other bits; likewise.
        PeerFaultError: another rank could not go on; it tells why.
        PeerTimeoutError, CapacityError: this rank could not exchange rows with the others.
        WorldSizeError: the world is not of `runtime.world_size` ranks.
        IdentityMismatchError: `resume` was made under other settings.
        WeightsMismatchError: `start_from` holds another model.
        UnsupportedArchError, TransportUnavailableError: the machine cannot run what was asked for.
    """
    # ---- build -------------------------------------------------------------------------------------------------------
    settings, runtime = config.train, config.runtime
    world = alone(runtime.device) if world is None else world
    if world.size != runtime.world_size:
        raise WorldSizeError(runtime.world_size, world.size)
    device = world.device
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    torch.manual_seed(runtime.seed)
    ops = select_ops(runtime.kernels, device)
    dtype = DTYPES[runtime.precision]
    transport = open_transport(config.rdep, world, max_tokens=settings.micro_batch_size * settings.seq_len, dtype=dtype)
    model = Transformer.build(
        config.model,
        ops,
        transport,
        device=device,
        dtype=dtype,
        seed=runtime.seed if resume is None and start_from is None else None,
    )
    model.train()
    flat = flatten(dict(model.named_parameters()), config.optim, world)
    gradients = Gradients(flat, ops)
    optimizer = Optimizer(flat, config.optim, ops)
    state = TrainState(model, optimizer, identity, labels)

    # ---- restore -----------------------------------------------------------------------------------------------------
    if resume is not None:
        state.restore(resume)
    elif start_from is not None:
        state.start_from(start_from)
    metrics = MetricsWriter(run.metrics, compact_every=config.metrics.compact_every) if world.rank == 0 else NoMetrics()
    metrics.drop_after(state.step)
    checkpointer = Checkpointer(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_every, world=world)
    checkpointer.drop_after(state.step)
    profiler = StepProfiler(
        profile if world.rank == 0 else None, run.path / "profile", device, first_step=state.step + 1
    )
    train_step = TrainStep(model, gradients, optimizer, config, transport, graph=runtime.uses_cuda_graph)
    ahead = Batches(batches, settings, world, documents)
    clock = Clock(config, device, state.step, transport.shared_bytes)
    recorder = Recorder(config, train_step, transport, clock, metrics, reporter)
    evaluation: Mapping[str, float] = {}
    saved_at = state.step if resume is not None else None

    def evaluates_at(step: int) -> bool:
        return evaluate is not None and (step == settings.steps or _is_due(step, evaluate_every))

    def saves_at(step: int) -> bool:
        return step == settings.steps or evaluates_at(step) or _is_due(step, config.checkpoint.every)

    def measure() -> Mapping[str, float]:
        assert evaluate is not None, "there is no evaluation without a function that measures"
        with train_step.memory():
            return _evaluate(model, evaluate, state.step, transport, metrics, reporter)

    def signal() -> int | None:
        # Of several ranks, what all of them have read in the same step's figures.
        return stop.received if world.size == 1 else recorder.signal

    with (
        _finishing(checkpointer), closing(transport), closing(reporter), closing(metrics), closing(ahead),
        StopSignal() as stop,
    ):  # fmt: skip
        description = _describe(config, device)
        reporter.start(RunStart(run.run_id, run.path, settings.steps, state.step, config.tokens_per_step, description))
        if mismatch := schedule_mismatch(config):
            reporter.message(mismatch)
        if config.checkpoint.enabled and state.step < settings.steps:
            to_come = [n for n in range(state.step + 1, settings.steps + 1) if saves_at(n)]
            _tell_room(*checkpointer.check_room(state.pieces(), state.documents(), to_come), reporter)
        due = evaluate is not None and resume is not None and evaluates_at(state.step)
        if due and not _was_evaluated(run, state, world):
            evaluation = measure()  # a kill had come between
            recorder.clock.skip()
        with profiler:
            while state.step < settings.steps and not _reached(settings, evaluation) and signal() is None:
                # ---- one step, and the record of the one before ------------------------------------------------------
                step = state.step + 1
                with profiler.range("batch"):
                    batch = ahead.take(state.cursor)
                launched = train_step.launch(step, state.cursor, batch, profiler.range, signal=stop.received)
                recorder.add(launched)
                state.step, state.cursor = step, state.cursor + settings.batch_size
                profiler.step(step)
                _tell_failures(checkpointer, reporter)

                # ---- save, then evaluate: an evaluation never costs a step -------------------------------------------
                due = saves_at(step)
                if due:
                    recorder.finish()
                if config.checkpoint.enabled and due:
                    checkpointer.save(step, state.pieces(), state.documents())
                    saved_at = step
                    reporter.checkpoint(step, checkpointer.path(step))
                if evaluates_at(step):
                    evaluation = measure()
                if due:
                    recorder.clock.skip()

        # ---- end -----------------------------------------------------------------------------------------------------
        recorder.finish()
        if config.checkpoint.enabled and saved_at != state.step and state.step > 0:
            checkpointer.save(state.step, state.pieces(), state.documents())
            reporter.checkpoint(state.step, checkpointer.path(state.step))
        try:
            checkpointer.wait()
        finally:
            _tell_failures(checkpointer, reporter)
        stopped_by = signal()
        if stopped_by is not None and state.step < settings.steps and not _reached(settings, evaluation):
            return Outcome("interrupted", state.step, recorder.loss, evaluation, int(stopped_by))
        if profile is not None and world.rank == 0:
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


@contextmanager
def _finishing(checkpointer: Checkpointer) -> Iterator[None]:
    """However the block ends, nothing is being written after it: the run's lock must outlive the write."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error that ended the block is the one to tell
            checkpointer.wait()
        raise


def _tell_room(room: int, at_once: int, reporter: Reporter) -> None:
    """A checkpoint that cannot be written ends the run there: better told now."""
    if room < at_once:
        reporter.message(
            f"The disk has room for {room} of this run's checkpoints, and {at_once} will stand there at once, with the "
            "one that is being written: free some, or set a smaller checkpoint.keep"
        )


def _tell_failures(checkpointer: Checkpointer, reporter: Reporter) -> None:
    while (failure := checkpointer.failure()) is not None:
        reporter.message(f"A checkpoint could not be written: {failure}")


def _reached(settings: TrainConfig, evaluation: Mapping[str, float]) -> bool:
    return settings.target_loss is not None and evaluation.get("val/loss", float("inf")) <= settings.target_loss


def _was_evaluated(run: RunFolder, state: TrainState, world: World) -> bool:
    """As rank 0 finds it: all ranks must do the same."""
    found = b""
    if world.rank == 0:
        rows = read_metrics(run.metrics, tags=["val/loss"])
        found = b"yes" if state.step in rows.column("step").to_pylist() else b"no"
    return world.share("was evaluated", found)[0] == b"yes"


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(
    model: Transformer,
    evaluate: Evaluate,
    step: int,
    transport: Transport,
    metrics: MetricsWriter | NoMetrics,
    reporter: Reporter,
) -> Mapping[str, float]:
    model.eval()
    try:
        with torch.no_grad():
            values = evaluate(model)
        _refuse_faults(step, transport)
    except Exception as error:  # whatever failed, the run's own work is worth more than a measurement
        if transport.world.size > 1:
            raise  # the other ranks are in the midst of it: there is no step that all could go on with
        reporter.message(f"step {step}: the evaluation failed and training goes on: {type(error).__name__}: {error}")
        return {}
    finally:
        model.train()
    metrics.write(step, values)
    reporter.evaluation(step, values)
    return values


def _refuse_faults(step: int, transport: Transport) -> None:
    """On all ranks, where one had a fault: what it gave the others then means nothing."""
    world, faults = transport.world, transport.faults
    faulty_W = torch.zeros(world.size, dtype=torch.int32, device=faults.healthy.device)
    faulty_W[world.rank] = 1 - faults.healthy
    world.sum_(faulty_W)
    faults.check()
    if bool(faulty_W.any()):
        raise PeerFaultError(step, faulty_W.nonzero().flatten().tolist())


def _describe(config: TrainingConfig, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, {config.runtime.precision}, {config.runtime.kernels} kernels"
