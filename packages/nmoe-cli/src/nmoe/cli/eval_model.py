"""The model that `n eval` measures: where it is, on how many ranks it is computed, and itself."""

from dataclasses import dataclass

from nmoe.cli.config import RunConfig, load_config
from nmoe.cli.context import Context
from nmoe.cli.context_length import context_length
from nmoe.cli.errors import UsageError
from nmoe.cli.eval_request import EvalRequest
from nmoe.cli.locate import Located, locate_model
from nmoe.cli.open_model import Device, OpenModel, computing, open_model
from nmoe.eval.lockstep import together
from nmoe.kernels.ops import select_ops
from nmoe.model.checkpoint import TensorFolder, open_folder
from nmoe.model.weights import read_config, read_model
from nmoe.rdep.schema import RdepConfig
from nmoe.rdep.transport import LocalTransport, Transport, open_transport
from nmoe.rdep.world import World, alone
from nmoe.train.checkpointer import load
from nmoe.train.loop import DTYPES

_FEWEST_TOKENS = 16_384
"""Of a forward call: enough to keep a GPU busy."""


@dataclass(frozen=True)
class Plan:
    """How a request is met."""

    located: Located
    config: RunConfig | None
    """Of the run; None for an imported model."""
    device: Device
    n_ranks: int
    length: int
    """Tokens that the model sees at once."""
    max_tokens: int
    """Of a forward call that scores or writes."""

    @property
    def timeout_s(self) -> float:
        """How long a rank waits for another."""
        return (self.config.rdep if self.config else RdepConfig()).timeout_s


@dataclass(frozen=True)
class EvalModel:
    """A model, and those who compute it together."""

    opened: OpenModel
    world: World
    transport: Transport

    def settle(self) -> None:
        """Call it before a figure is told: what the ranks exchanged has arrived on all of them.

        Raises:
            RdepError: it has not.
        """
        together(self.world, "eval exchanges", self.transport.faults.check)


def plan_of(request: EvalRequest, context: Context) -> Plan:
    """Finds the model, and what it is to be computed on.

    Raises:
        UnknownModelError: there is none.
        UsageError: the request contradicts itself or the model.
    """
    located = locate_model(request.run, context.data_root)
    config = load_config(located.run.config, environ=context.environ).config if located.run is not None else None
    length = request.seq_len or (config.train.seq_len if config else None)
    if length is None:
        most = context_length(open_folder(located.folder, verify=False), None)
        words = "" if most is None else f", of at most {most} tokens, its context"
        raise UsageError(f"{request.run} is no run and names no sequence length: add --seq-len{words}")
    if request.gpus is not None and request.device == "cpu":
        raise UsageError(f"--gpus {request.gpus}: expected no --device cpu beside it: leave out one of them")
    own: Device = config.runtime.device if config else "cpu"
    device: Device = "cuda" if request.gpus is not None else request.device or own
    n_ranks = request.gpus or (config.runtime.world_size if config and device == own == "cpu" else 1)
    return Plan(located, config, device, n_ranks, length, request.max_tokens or max(length, _FEWEST_TOKENS))


def check_ranks(request: EvalRequest, plan: Plan) -> None:
    """Refuses a number of ranks that the model does not bear.

    Raises:
        UsageError: the experts cannot be divided, or the kernels do not move rows between GPUs.
    """
    model = read_config(open_folder(plan.located.folder, verify=False))
    if model.n_routed_experts is not None and model.n_routed_experts % plan.n_ranks:
        raise UsageError(
            f"expected ranks among which {model.n_routed_experts} experts divide, found {plan.n_ranks}: use another "
            "--gpus"
        )
    on_gpus = plan.device == "cuda" and plan.n_ranks > 1
    if (
        on_gpus
        and model.n_routed_experts is not None
        and computing(plan.config, plan.device, request.kernels).tier != "native"
    ):
        raise UsageError(
            f"expected native kernels, which move rows between {plan.n_ranks} GPUs, found 'reference': add --kernels "
            "native, or use one GPU"
        )


def open_alone(request: EvalRequest, context: Context, plan: Plan) -> EvalModel:
    """The model on this rank alone. Raises as `open_model` does."""
    opened = open_model(request.run, context, plan.device, request.kernels)
    device = opened.model.head.weight.device
    return EvalModel(opened, alone(device), LocalTransport())


def open_on_ranks(request: EvalRequest, plan: Plan, world: World) -> EvalModel:
    """This rank's part of the model: all but its experts is on every rank. All ranks call it together.

    Raises:
        RefusedCheckpointError: files are damaged; rank 0 has looked at every one of them.
        Any error of the exchange between ranks.
    """
    how = computing(plan.config, plan.device, request.kernels)
    dtype, ops = DTYPES[how.precision], select_ops(how.tier, world.device)

    def open_files() -> TensorFolder:
        return load(plan.located.folder) if world.rank == 0 else open_folder(plan.located.folder, verify=False)

    folder = together(world, "eval checkpoint", open_files)
    most = [plan.max_tokens] if request.benchmarks else []
    if request.validates or request.measures_text:
        most.append(request.batch_size * plan.length)
    # With room for whatever routers choose, whatever bound saved memory in training.
    transport = open_transport(RdepConfig(timeout_s=plan.timeout_s), world, max_tokens=max(most), dtype=dtype)
    model = together(world, "eval model", lambda: read_model(folder, ops, transport, device=world.device, dtype=dtype))
    return EvalModel(OpenModel(model, folder, plan.located, plan.config, how.as_trained), world, transport)
