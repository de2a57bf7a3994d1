"""The sections that the trainer owns: `[train]`, `[optim]`, `[schedule]`, `[checkpoint]`, `[metrics]`, `[runtime]`.

Imports no torch. A field marked "identity" decides what is computed: changing it at resume is an error.
"""

from typing import Annotated, Any, Literal, Self

from nmoe.model.schema import ModelConfig
from nmoe.rdep.schema import RdepConfig
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _all_or_indices(value: Any) -> Any:
    """Refuses in one sentence: of a union, pydantic tells an error for each of its branches."""
    if value == "all":
        return value
    if isinstance(value, list | tuple) and all(type(index) is int and index >= 0 for index in value):
        return tuple(value)
    raise ValueError(f'expected "all" or a list of layers such as [0, 1, 2], counted from 0, found {value!r}')


Layers = Annotated[Literal["all"] | tuple[int, ...], BeforeValidator(_all_or_indices)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainConfig(Section):
    """Length and batch of a run."""

    steps: PositiveInt
    """Optimizer steps in all, counted from the run's start."""
    batch_size: Annotated[PositiveInt, "identity"]
    """Global batch, in sequences."""
    micro_batch_size: PositiveInt
    """Sequences a rank puts through the model at once; gradients accumulate up to `batch_size`."""
    seq_len: Annotated[PositiveInt, "identity"]
    """Predicted tokens a sequence, S; a sample holds S + 1."""
    recompute_layers: Layers = ()
    """Layers that keep only their input for the backward, which computes their forward again: the same bits in less
    memory and more time. Indices, MTP's modules numbered on from the trunk's layers, or "all"."""
    verify_every: PositiveInt | None = None
    """Every so many steps the gradients are computed again, and the run ends if one has other bits: of a GPU that
    computes wrong now and then, nothing else tells. Costs those steps' forward and backward. Absent: never."""
    verify_times: PositiveInt = 1
    """How many times again."""
    target_loss: PositiveFloat | None = None
    """Stop once an evaluation's validation loss (nats a token) is at or under this."""


class OptimConfig(Section):
    """AdamW groups and Muon."""

    lr_dense: Annotated[PositiveFloat, "identity"]
    lr_router: Annotated[PositiveFloat, "identity"]
    lr_expert: Annotated[PositiveFloat, "identity"]
    lr_embed: Annotated[PositiveFloat | None, "identity"] = None
    """Embedding, head and norms; absent: `lr_dense`. Under Muon these stay on AdamW."""
    dense_optimizer: Annotated[Literal["adamw", "muon"], "identity"] = "adamw"
    """For the hidden 2-D weights outside the experts."""
    expert_optimizer: Annotated[Literal["adamw", "muon"], "identity"] = "adamw"
    beta1: Annotated[Beta, "identity"] = 0.9
    beta2_dense: Annotated[Beta, "identity"] = 0.95
    beta2_router: Annotated[Beta, "identity"] = 0.95
    beta2_expert: Annotated[Beta, "identity"] = 0.95
    eps: Annotated[PositiveFloat, "identity"] = 1e-8
    weight_decay: Annotated[NonNegativeFloat, "identity"] = 0.1
    """Decoupled. The router, norms and biases are not decayed."""
    muon_momentum: Annotated[Beta, "identity"] = 0.95
    muon_steps: Annotated[PositiveInt, "identity"] = 5
    """Newton-Schulz iterations."""
    clip_grad_norm: Annotated[PositiveFloat | None, "identity"] = 1.0
    """Global gradient norm above which gradients are scaled down; absent: never."""
    reduce_scatter_chunk_mb: PositiveInt = 64
    """MiB of fp32 gradients that ranks sum at once: more keep links busier, fewer take less memory."""


class ScheduleConfig(Section):
    """Warm-up, hold, decay (WSD), in tokens: linear up, flat, linear down to a floor."""

    warmup_steps: Annotated[NonNegativeInt, "identity"] = 0
    hold_tokens: Annotated[NonNegativeInt, "identity"]
    """Tokens at the full rate after warm-up."""
    decay_tokens: Annotated[NonNegativeInt, "identity"] = 0
    """Tokens over which the rate falls; 0 holds it for ever."""
    decay_floor: Annotated[Fraction, "identity"] = 0.0
    """The rate after decay, as a fraction of the full rate."""


class CheckpointConfig(Section):
    """When the run's state goes to disk: besides `every`, the last step, before each evaluation, and on a signal."""

    enabled: bool = True
    """False saves nothing at all: for timing runs."""
    every: PositiveInt | None = None
    """Steps between checkpoints; absent: only where the run saves anyway."""
    keep: PositiveInt = 2
    """The newest so many stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this stay for ever."""


class MetricsConfig(Section):
    """How much is recorded."""

    every: PositiveInt = 1
    """Steps between rows of metrics and lines on the console."""
    compact_every: PositiveInt = 200
    """Recorded steps whose Parquet files are joined into one in the background."""


class RuntimeConfig(Section):
    """Where and in which numbers the run computes."""

    device: Annotated[Literal["cpu", "cuda"], "identity"]
    precision: Annotated[Literal["fp32", "bf16"], "identity"]
    kernels: Annotated[Literal["reference", "native"], "identity"]
    """`native`: the kernels for the GPU at hand. `reference`: PyTorch on any device, only when asked for."""
    seed: Annotated[NonNegativeInt, "identity"] = 0
    world_size: PositiveInt = 1
    """Ranks, one process each: on GPUs one a GPU, all of one host."""
    cuda_graph: bool | None = None
    """Steps are captured in CUDA graphs: the same bits in less of the host's time. Absent: with native kernels, yes."""
    threads: PositiveInt | None = None
    """CPU threads of a rank; absent: PyTorch's choice for one rank, and of W ranks each the machine's cores over W (at
    least 1), unless `OMP_NUM_THREADS` is set. Bit-equal resume needs the same number."""

    @property
    def uses_cuda_graph(self) -> bool:
        """Whether steps are captured in CUDA graphs."""
        return self.kernels == "native" if self.cuda_graph is None else self.cuda_graph


class TrainingConfig(Section):
    """Everything that the trainer reads."""

    model: ModelConfig
    rdep: RdepConfig = RdepConfig()
    train: TrainConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        ranks, micro, batch = self.runtime.world_size, self.train.micro_batch_size, self.train.batch_size
        problems = []
        if batch % (micro * ranks):
            problems.append(
                f"train.batch_size = {batch} is no multiple of train.micro_batch_size × runtime.world_size "
                f"= {micro} × {ranks}"
            )
        if self.model.mtp_depth >= self.train.seq_len:
            problems.append(f"model.mtp_depth = {self.model.mtp_depth} leaves nothing of train.seq_len")
        if self.model.n_routed_experts is not None and self.model.n_routed_experts % ranks:
            problems.append(
                f"model.n_routed_experts = {self.model.n_routed_experts} do not divide among runtime.world_size = "
                f"{ranks} ranks"
            )
        problems += self.rdep.problems(ranks, self.runtime.device)
        problems += self._layers_problems()
        if self.runtime.kernels == "native" and self.runtime.precision != "bf16":
            problems.append(
                "runtime.kernels = 'native' computes in bf16: runtime.precision = 'bf16', or kernels 'reference'"
            )
        if self.runtime.device == "cpu" and self.runtime.kernels == "native":
            problems.append("runtime.device = 'cpu' has reference kernels only: runtime.kernels = 'reference'")
        if (
            ranks > 1
            and self.runtime.device == "cuda"
            and self.runtime.kernels == "reference"
            and self.model.n_routed_experts
        ):
            problems.append(
                f"runtime.world_size = {ranks} on GPUs needs native kernels, which move the rows: runtime.kernels = "
                "'native', or one rank"
            )
        if self.runtime.kernels == "reference" and self.runtime.cuda_graph:
            problems.append(
                "runtime.cuda_graph = true needs kernels that leave counts on the GPU: runtime.kernels = 'native', or "
                "leave out runtime.cuda_graph"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _layers_problems(self) -> list[str]:
        chosen, layers = self.train.recompute_layers, self.model.n_layers + self.model.mtp_depth
        if chosen == "all":
            return []
        found = [str(layer) for layer in sorted(set(chosen)) if layer >= layers]
        found += [f"{layer} more than once" for layer in sorted(set(chosen)) if chosen.count(layer) > 1]
        if not found:
            return []
        return [
            f"train.recompute_layers: expected layers of the {layers} (model.n_layers + model.mtp_depth) that there are"
            f", each once, found {' and '.join(found)}: leave out what is too much, or write 'all'"
        ]

    @property
    def recomputed_layers(self) -> tuple[int, ...]:
        """The layers of `train.recompute_layers`, in order."""
        chosen = self.train.recompute_layers
        return tuple(range(self.model.n_layers + self.model.mtp_depth)) if chosen == "all" else tuple(sorted(chosen))

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one global batch."""
        return self.train.batch_size * self.train.seq_len
