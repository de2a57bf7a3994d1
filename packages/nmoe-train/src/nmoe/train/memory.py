"""What a rank needs of memory, predicted from the configuration. Imports no torch.

Parameters, gradients and optimizer state are sums over shapes. Activations are a sum over what autograd keeps of a
micro-batch plus the largest temporaries; the comments name the tensors.
"""

from dataclasses import dataclass
from math import prod

from nmoe.model.count import parameter_shapes
from nmoe.model.schema import ModelConfig
from nmoe.train.schema import TrainingConfig


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on one rank."""

    parameters: int
    """Weights as the kernels read them, and the 16-bit residuals that make them exact fp32 masters."""
    gradients: int
    """fp32 accumulators; of several ranks also a micro-batch's gradients of all that ranks divide, before these are
    summed."""
    optimizer: int
    """Moments or momentum, fp32."""
    activations: int
    """Kept for the backward of one micro-batch; of a recomputed layer, its input."""
    workspace: int
    """The largest temporaries that live at once, with what the backward of a recomputed layer computes again, less what
    the backwards before it have freed."""

    slabs: int = 0
    """Of several ranks: where the tokens of all land, for each MoE layer, and for what comes back."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace + self.slabs


def predict_memory(config: TrainingConfig) -> MemoryNeed:
    """Bytes that each rank needs. With W ranks, experts are sharded; of the rest, weights are replicated and masters,
    accumulators and optimizer state sharded (ZeRO-2); what fills up pieces is not counted."""
    ranks, bf16 = config.runtime.world_size, config.runtime.precision == "bf16"
    weight_bytes, residual_bytes = (2, 2) if bf16 else (4, 0)
    parameters = gradients = optimizer = 0.0
    for name, shape in parameter_shapes(config.model).items():
        size, expert = prod(shape), ".experts." in name
        router = name.endswith("router.weight")  # fp32 always, so without a residual
        here = size / ranks
        parameters += (here if expert else size) * (4 if router else weight_bytes)
        parameters += 0 if router else here * residual_bytes
        gradients += here * 4
        gradients += size * 4 if ranks > 1 and not expert else 0
        optimizer += here * 4 * _moments(config, name)
    if ranks > 1:
        gradients += (config.optim.reduce_scatter_chunk_mb << 20) / ranks  # a piece of a later micro-batch's sum
    return MemoryNeed(
        parameters=int(parameters),
        gradients=int(gradients),
        optimizer=int(optimizer),
        activations=_activations(config),
        workspace=_workspace(config),
        slabs=_slabs(config),
    )


def _slabs(config: TrainingConfig) -> int:
    """A slab for each MoE layer and one for gradients, with a token's experts and gates, and one for what comes back,
    with gates' gradients."""
    model, ranks = config.model, config.runtime.world_size
    layers = sum(not model.is_dense(layer) for layer in range(model.n_layers + model.mtp_depth))
    if ranks == 1 or layers == 0:
        return 0
    top_k = model.n_activated_experts or 0
    tokens = ranks * config.train.micro_batch_size * config.train.seq_len
    rows = tokens * _bytes(config) * model.dim
    return (layers + 1) * (rows + tokens * 8 * top_k) + rows + tokens * 4 * top_k


def routed_rows(config: TrainingConfig) -> int:
    """Rows of this rank's experts that there is room for: K a token for one rank alone, of several what `[rdep]`
    says."""
    ranks, top_k = config.runtime.world_size, config.model.n_activated_experts or 0
    tokens = config.train.micro_batch_size * config.train.seq_len
    if ranks == 1:
        return tokens * top_k
    return config.rdep.row_capacity(tokens, top_k, (config.model.n_routed_experts or 0) // ranks, ranks)


def _moments(config: TrainingConfig, name: str) -> int:
    if ".experts." in name:
        return 1 if config.optim.expert_optimizer == "muon" else 2
    matrix = not ("norm" in name or name.startswith(("embed", "head")) or name.endswith("router.weight"))
    return 1 if matrix and config.optim.dense_optimizer == "muon" else 2


def _activations(config: TrainingConfig) -> int:
    model, width = config.model, _bytes(config)
    tokens = config.train.micro_batch_size * config.train.seq_len
    layers = sum(_kept(config, layer) for layer in range(model.n_layers + model.mtp_depth))
    heads = 1 + model.mtp_depth
    # input and gradient of the head's chunks, and the head's fp32 gradient until it is added to the accumulator
    return layers + heads * (tokens * width * 2 * model.dim + 4 * model.vocab_size * model.dim)


def _kept(config: TrainingConfig, layer: int) -> int:
    spared = saved_by_recomputing(config, layer) if layer in config.recomputed_layers else 0
    return _layer_activations(config, layer) - spared


def saved_by_recomputing(config: TrainingConfig, layer: int) -> int:
    """Bytes between a layer's forward and backward that it does without, if it keeps its input alone."""
    inputs = 2 if layer >= config.model.n_layers else 1  # MTP: the states before, and embeddings
    tokens = config.train.micro_batch_size * config.train.seq_len
    return _layer_activations(config, layer) - tokens * _bytes(config) * config.model.dim * inputs


def _layer_activations(config: TrainingConfig, layer: int) -> int:
    model, width = config.model, _bytes(config)
    tokens = config.train.micro_batch_size * config.train.seq_len
    # residual stream and its norm, before attention and before the feed-forward part
    total = tokens * width * (4 * model.dim + _attention_width(model))
    if layer >= model.n_layers:
        # both norms' inputs and outputs, their concatenation, the last norm
        total += tokens * width * model.dim * 7
    if model.is_dense(layer):
        return total + tokens * width * 3 * (model.inter_dim or 0)  # pre-activation 2F, activation F
    hidden, rows = model.moe_inter_dim or 0, routed_rows(config)
    total += width * (2 * rows + 3 * tokens * model.n_shared_experts) * hidden
    if config.runtime.kernels == "native":
        total += tokens * 4 * (model.n_routed_experts or 0)  # the router's logits
        return total + rows * 4 * 4  # row indices
    total += tokens * 4 * (model.dim + 6 * (model.n_routed_experts or 0))  # its fp32 input too
    return total + rows * 8 * 3


def _attention_width(model: ModelConfig) -> int:
    """Elements a token that attention keeps: query, key, value, output (twice: as attention and as projection see it),
    and MLA's latents before and after their norms. Plain attention's value is a view of the product of all three, whose
    queries and keys are there beside those that norm and RoPE gave."""
    heads = model.n_heads
    if model.attn == "sdpa":
        return 7 * heads * (model.head_dim or 0)
    qk = (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0)
    value = model.v_head_dim or 0
    return heads * (2 * qk + 3 * value) + 2 * (model.kv_lora_rank or 0) + 2 * (model.q_lora_rank or 0)


def _workspace(config: TrainingConfig) -> int:
    model, width = config.model, _bytes(config)
    tokens = config.train.micro_batch_size * config.train.seq_len
    most = max(1, (1 << 29) // model.vocab_size)  # rows of a chunk, as nmoe.kernels.reference.cross_entropy has them
    rows = min(tokens, 1 << (most.bit_length() - 1))
    temporary = 4 if config.runtime.kernels == "reference" else 0
    most_at_once = rows * model.vocab_size * (4 + temporary + width) + 4 * model.vocab_size * model.dim  # the head's
    freed = 0
    for layer in reversed(range(model.n_layers + model.mtp_depth)):
        again = saved_by_recomputing(config, layer) if layer in config.recomputed_layers else 0
        most_at_once = max(most_at_once, _backward_temporaries(config, layer) + again - freed)
        freed += _kept(config, layer)
    return most_at_once


def _backward_temporaries(config: TrainingConfig, layer: int) -> int:
    model, width = config.model, _bytes(config)
    if model.is_dense(layer):
        return 0
    rows = routed_rows(config)
    hidden, experts = model.moe_inter_dim or 0, (model.n_routed_experts or 0) // config.runtime.world_size
    return rows * width * (2 * model.dim + 3 * hidden) + experts * 2 * hidden * model.dim * width


def _bytes(config: TrainingConfig) -> int:
    return 2 if config.runtime.precision == "bf16" else 4
