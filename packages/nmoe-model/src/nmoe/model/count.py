"""Parameters and FLOPs of a configuration, counted from its shapes. Imports no torch."""

from dataclasses import dataclass
from math import prod

from nmoe.model.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Every parameter of `Transformer(config)` by name, in its order."""
    shapes: Shapes = {"embed.weight": (config.vocab_size, config.dim)}
    for layer in range(config.n_layers):
        shapes |= _block(config, layer, f"layers.{layer}.")
    shapes |= {"norm.weight": (config.dim,), "head.weight": (config.vocab_size, config.dim)}
    for depth in range(config.mtp_depth):
        prefix = f"mtp.{depth}."
        shapes |= {f"{prefix}{name}_norm.weight": (config.dim,) for name in ("hidden", "embed")}
        shapes[f"{prefix}proj.weight"] = (config.dim, 2 * config.dim)
        shapes |= _block(config, config.n_layers + depth, f"{prefix}block.")
        shapes[f"{prefix}norm.weight"] = (config.dim,)
    return shapes


def _block(config: ModelConfig, layer: int, prefix: str) -> Shapes:
    shapes: Shapes = {"attn_norm.weight": (config.dim,)}
    shapes |= {f"attn.{name}": shape for name, shape in _attention(config).items()}
    shapes["ffn_norm.weight"] = (config.dim,)
    if config.is_dense(layer):
        shapes |= {f"ffn.{name}": shape for name, shape in _mlp(config.dim, config.inter_dim or 0).items()}
    else:
        experts, hidden = config.n_routed_experts or 0, config.moe_inter_dim or 0
        shapes["ffn.router.weight"] = (experts, config.dim)
        shapes["ffn.experts.w13"] = (experts, 2, hidden, config.dim)
        shapes["ffn.experts.w2"] = (experts, config.dim, hidden)
        if config.n_shared_experts:
            shared = _mlp(config.dim, hidden * config.n_shared_experts)
            shapes |= {f"ffn.shared.{name}": shape for name, shape in shared.items()}
    return {prefix + name: shape for name, shape in shapes.items()}


def _mlp(width: int, hidden: int) -> Shapes:
    return {"w13": (2, hidden, width), "w2": (width, hidden)}


def _attention(config: ModelConfig) -> Shapes:
    width, heads = config.dim, config.n_heads
    if config.attn == "sdpa":
        inner = heads * (config.head_dim or 0)
        shapes: Shapes = {"wqkv": (3, inner, width), "wo.weight": (width, inner)}
        if config.qk_norm:
            shapes |= {f"{name}.weight": (config.head_dim or 0,) for name in ("q_norm", "k_norm")}
        return shapes
    rank, nope, rope, value = (
        config.kv_lora_rank or 0,
        config.qk_nope_head_dim or 0,
        config.qk_rope_head_dim or 0,
        config.v_head_dim or 0,
    )
    if config.q_lora_rank is None:
        shapes = {"wq.weight": (heads * (nope + rope), width)}
    else:
        shapes = {
            "wq_a.weight": (config.q_lora_rank, width),
            "q_norm.weight": (config.q_lora_rank,),
            "wq_b.weight": (heads * (nope + rope), config.q_lora_rank),
        }
    return shapes | {
        "wkv_a.weight": (rank + rope, width),
        "kv_norm.weight": (rank,),
        "wkv_b.weight": (heads * (nope + value), rank),
        "wo.weight": (width, heads * value),
    }


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    active: int
    """That a token meets: output head and its K experts, not the embedding, not MTP."""
    embedding: int
    experts: int
    """Of routed experts, in all."""
    mtp: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts by what a token meets."""
    total = active = experts = mtp = 0
    for name, shape in parameter_shapes(config).items():
        size = prod(shape)
        total += size
        is_expert = ".experts." in name
        experts += size if is_expert else 0
        if name.startswith("mtp."):
            mtp += size
        elif name != "embed.weight":
            active += size * (config.n_activated_experts or 0) // shape[0] if is_expert else size
    return ParameterCount(total, active, config.vocab_size * config.dim, experts, mtp)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per predicted token: `6 · N_active` plus causal attention; MTP is not counted."""
    attention = sum(3 * attention_flops(config, layer, seq_len) for layer in range(config.n_layers))
    return 6.0 * count_parameters(config).active + attention


def attention_flops(config: ModelConfig, layer: int, seq_len: int) -> float:
    """FLOPs of a layer's causal attention, forward, per token. A global layer's token sees half the sequence on
    average, a local one's at most its window."""
    if config.attn == "mla":
        widths = (config.qk_nope_head_dim or 0) + (config.qk_rope_head_dim or 0) + (config.v_head_dim or 0)
    else:
        widths = 2 * (config.head_dim or 0)
    window = min(config.attn_local_window or seq_len, seq_len) if config.is_local(layer) else seq_len
    return 2 * config.n_heads * widths * window * (1 - window / (2 * seq_len))
