"""The `[model]` section: the shape of the network, in DeepSeek's own names. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

NonNegativeFraction = Annotated[float, Field(ge=0.0)]


class YarnConfig(BaseModel):
    """YaRN context extension (arXiv:2309.00071) as DeepSeek-V3 applies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: Annotated[float, Field(gt=1.0)]
    """Context length after extension over `original_seq_len`."""
    original_seq_len: PositiveInt
    """Context length that the frequencies were trained at."""
    beta_fast: PositiveFloat = 32.0
    """Rotations over the original context above which a frequency is left alone."""
    beta_slow: PositiveFloat = 1.0
    """Rotations over the original context below which a frequency is fully interpolated."""
    mscale: PositiveFloat = 1.0
    """Scale of cos and sin, relative to `mscale_all_dim`."""
    mscale_all_dim: PositiveFloat = 1.0
    """Its temperature, squared, multiplies the softmax scale."""


class ModelConfig(BaseModel):
    """Shape and semantics of the transformer. Every field decides what is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: Annotated[PositiveInt, "identity"]
    """Rows of embedding and head; at least the tokenizer's number of ids."""
    dim: Annotated[PositiveInt, "identity"]
    """Model width D."""
    n_layers: Annotated[PositiveInt, "identity"]
    n_dense_layers: Annotated[int, "identity", Field(ge=0)] = 1
    """The first so many layers have a dense MLP instead of experts."""
    n_heads: Annotated[PositiveInt, "identity"]
    norm_eps: Annotated[PositiveFloat, "identity"] = 1e-6
    """Epsilon of the block and final norms (MLA's two latent norms always use 1e-6, as released)."""
    init_std: Annotated[PositiveFloat, "identity"] = 0.006
    """Standard deviation of every weight matrix at the start (DeepSeek-V3 report, section 4.2)."""

    attn: Annotated[Literal["mla", "sdpa"], "identity"] = "mla"
    """Kind of the global layers: multi-head latent attention, or plain multi-head attention."""
    attn_local: Annotated[Literal["swa"] | None, "identity"] = None
    """Kind of the local layers: the global kind's projections and cache under a sliding window."""
    attn_global_every: Annotated[PositiveInt | None, "identity"] = None
    """Every so-manieth layer is global, the others local; the last layer is always global."""
    attn_local_window: Annotated[PositiveInt | None, "identity"] = None
    """A local layer's token sees itself and the `attn_local_window - 1` tokens before it."""

    q_lora_rank: Annotated[PositiveInt | None, "identity"] = None
    """MLA: rank of the query latent; absent for a full query projection."""
    kv_lora_rank: Annotated[PositiveInt | None, "identity"] = None
    """MLA: width of the cached key-value latent."""
    qk_nope_head_dim: Annotated[PositiveInt | None, "identity"] = None
    """MLA: part of a query-key head without position."""
    qk_rope_head_dim: Annotated[PositiveInt | None, "identity"] = None
    """MLA: part of a query-key head with RoPE; its key is shared by all heads."""
    v_head_dim: Annotated[PositiveInt | None, "identity"] = None
    """MLA: width of a value head."""
    head_dim: Annotated[PositiveInt | None, "identity"] = None
    """sdpa: width of a query, key and value head."""
    qk_norm: Annotated[bool, "identity"] = False
    """sdpa: RMSNorm over each query and key head before RoPE."""
    rope_theta: Annotated[PositiveFloat, "identity"] = 10_000.0
    yarn: Annotated[YarnConfig | None, "identity"] = None

    inter_dim: Annotated[PositiveInt | None, "identity"] = None
    """Hidden width of the dense layers' MLP."""
    moe_inter_dim: Annotated[PositiveInt | None, "identity"] = None
    """Hidden width F of one expert."""
    n_routed_experts: Annotated[PositiveInt | None, "identity"] = None
    n_shared_experts: Annotated[int, "identity", Field(ge=0)] = 0
    """Shared experts, computed as one MLP of `n_shared_experts * moe_inter_dim` hidden units."""
    n_activated_experts: Annotated[PositiveInt | None, "identity"] = None
    """Routed experts per token, K."""
    n_expert_groups: Annotated[PositiveInt, "identity"] = 1
    n_limited_groups: Annotated[PositiveInt, "identity"] = 1
    """A token's experts come from at most so many groups (DeepSeek-V3 report, section 2.1.2)."""
    route_scale: Annotated[PositiveFloat, "identity"] = 1.0
    """Factor on the normalised gate weights."""
    router_bias_update_rate: Annotated[NonNegativeFraction, "identity"] = 1e-3
    """Step of the aux-loss-free selection bias, once an applied optimizer step (arXiv:2408.15664)."""
    seq_balance_loss: Annotated[NonNegativeFraction, "identity"] = 0.0
    """Weight of the sequence-wise balance loss (DeepSeek-V3 report, equations 17 to 20); 0 leaves it out."""
    aux_loss: Annotated[NonNegativeFraction, "identity"] = 0.0
    """Weight of the Switch-style load-balancing loss over a micro-batch (arXiv:2101.03961); 0 leaves it out."""

    mtp_depth: Annotated[int, "identity", Field(ge=0)] = 0
    """Multi-token-prediction modules after the trunk (DeepSeek-V3 report, section 2.2)."""
    mtp_loss_weight: Annotated[NonNegativeFraction, "identity"] = 0.3
    """λ of equation 25."""

    @model_validator(mode="after")
    def _shape_is_whole(self) -> Self:
        problems = [*self._attention_problems(), *self._feed_forward_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _attention_problems(self) -> list[str]:
        mla = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        foreign = ("head_dim",) if self.attn == "mla" else (*mla, "q_lora_rank")
        problems = [f"attn = {self.attn!r} does not use {name}" for name in foreign if getattr(self, name) is not None]
        needed = mla if self.attn == "mla" else ("head_dim",)
        problems += [f"attn = {self.attn!r} needs {name}" for name in needed if getattr(self, name) is None]
        if self.attn == "mla" and self.qk_norm:
            problems.append("qk_norm belongs to attn = 'sdpa'")
        if self.rope_dim is not None and self.rope_dim % 2:
            problems.append(f"RoPE turns pairs: {self.rope_dim} is odd")
        local = (self.attn_local, self.attn_global_every, self.attn_local_window)
        if any(value is not None for value in local) and None in local:
            problems.append("attn_local, attn_global_every and attn_local_window go together")
        return problems

    def _feed_forward_problems(self) -> list[str]:
        problems = []
        if self.n_dense_layers > self.n_layers:
            problems.append(f"n_dense_layers = {self.n_dense_layers} exceeds n_layers = {self.n_layers}")
        if self.n_dense_layers and self.inter_dim is None:
            problems.append("dense layers need inter_dim")
        if not self.has_moe:
            return problems
        needed = ("moe_inter_dim", "n_routed_experts", "n_activated_experts")
        missing = [f"MoE layers need {name}" for name in needed if getattr(self, name) is None]
        if missing or self.n_routed_experts is None or self.n_activated_experts is None:
            return problems + missing
        experts, groups, limit = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
        if experts % groups:
            problems.append(f"n_routed_experts = {experts} is no multiple of n_expert_groups = {groups}")
        if limit > groups:
            problems.append(f"n_limited_groups = {limit} exceeds n_expert_groups = {groups}")
        if groups > 1 and experts // groups < 2:
            problems.append("group scores sum a group's two best experts: a group needs at least two")
        if self.n_activated_experts > limit * (experts // groups):
            problems.append(
                f"n_activated_experts = {self.n_activated_experts} exceeds the {limit * (experts // groups)} "
                "experts that a token may reach"
            )
        return problems

    @property
    def has_moe(self) -> bool:
        """Whether any block, MTP's included, has experts."""
        return self.n_dense_layers < self.n_layers

    @property
    def rope_dim(self) -> int | None:
        """Width of the part of a head that RoPE turns."""
        return self.qk_rope_head_dim if self.attn == "mla" else self.head_dim

    def is_local(self, layer: int) -> bool:
        """Whether `layer` (MTP blocks count on from `n_layers`, and are global) attends within the window."""
        if self.attn_global_every is None or layer >= self.n_layers - 1:
            return False
        return (layer + 1) % self.attn_global_every != 0

    def is_dense(self, layer: int) -> bool:
        """Whether `layer` has a dense MLP. MTP blocks are of the last trunk layer's kind."""
        return min(layer, self.n_layers - 1) < self.n_dense_layers
