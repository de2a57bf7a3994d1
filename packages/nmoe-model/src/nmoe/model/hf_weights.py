"""Names and layout of the released DeepSeek-V3 tensors beside ours: one table, read in both directions.

Shapes: D model width, F hidden width, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from nmoe.model.count import parameter_shapes
from nmoe.model.schema import ModelConfig

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
}
_MTP = {
    "hidden_norm.weight": "hnorm.weight",
    "embed_norm.weight": "enorm.weight",
    "proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_MTP_COPIES = {"embed.weight": "embed_tokens.weight", "head.weight": "shared_head.head.weight"}
_MLPS = {"ffn.": "mlp.", "ffn.shared.": "mlp.shared_experts."}


@dataclass(frozen=True)
class Part:
    """A released tensor as a part of one of ours."""

    ours: str
    """The name of our tensor."""
    shape: tuple[int, ...]
    """Of the released tensor."""
    index: tuple[int, ...] = ()
    """Our tensor's entry that it is (expert; gate 0 or up 1); empty: all of it."""
    halves_swapped: bool = False
    """Whether the halves of its columns change places: the released `eh_proj` takes the embedding first."""
    is_copy: bool = False
    """Whether it repeats the trunk's tensor, which an MTP module shares."""

    def from_ours(self, ours: torch.Tensor) -> torch.Tensor:
        """The released tensor, from our whole one; a view where that is possible."""
        part = ours[self.index]
        return part.roll(part.shape[1] // 2, 1) if self.halves_swapped else part

    @property
    def is_whole(self) -> bool:
        """Whether it is our tensor as it stands."""
        return not self.index and not self.halves_swapped

    def into_ours(self, ours: torch.Tensor, part: torch.Tensor) -> None:
        """Writes the released tensor into our whole one."""
        ours[self.index].copy_(part.roll(part.shape[1] // 2, 1) if self.halves_swapped else part)

    @property
    def keeps_fp32(self) -> bool:
        """Whether it is fp32 in a model of any precision: the selection bias, whose steps bf16 would swallow."""
        return self.ours.endswith(".router.bias")


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of `Transformer.state()` by name: parameters and the routers' selection biases."""
    shapes = dict(parameter_shapes(config))
    for name, shape in parameter_shapes(config).items():
        if name.endswith(".router.weight"):
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    return shapes


def released_parts(config: ModelConfig) -> dict[str, Part]:
    """Every tensor of a released checkpoint of `config`, by its name there.

    MTP module k is layer `n_layers + k` (from 0), and repeats embedding and head.
    """
    parts: dict[str, Part] = {}
    for name, shape in state_shapes(config).items():
        parts |= dict(_parts(name, shape, config))
    return parts


def hollow_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Released tensors without elements: of a model without shared experts, readers expect them with no hidden unit."""
    if config.n_shared_experts:
        return {}
    shapes = {"gate_proj": (0, config.dim), "up_proj": (0, config.dim), "down_proj": (config.dim, 0)}
    return {
        f"model.layers.{layer}.{_MLPS['ffn.shared.']}{projection}.weight": shape
        for layer in range(config.n_layers + config.mtp_depth)
        if not config.is_dense(layer)
        for projection, shape in shapes.items()
    }


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a released tensor of that name belongs to an MTP module."""
    start, _, rest = name.partition("model.layers.")
    layer = rest.partition(".")[0]
    return not start and layer.isdecimal() and int(layer) >= config.n_layers


def _parts(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, Part]]:
    if name in _TOP:
        yield _TOP[name], Part(name, shape)
        for layer in range(config.n_layers, config.n_layers + config.mtp_depth):
            if name in _MTP_COPIES:
                yield f"model.layers.{layer}.{_MTP_COPIES[name]}", Part(name, shape, is_copy=True)
        return
    kind, number, rest = name.split(".", 2)
    layer = int(number) + (config.n_layers if kind == "mtp" else 0)
    prefix = f"model.layers.{layer}."
    if kind == "mtp" and rest in _MTP:
        yield prefix + _MTP[rest], Part(name, shape, halves_swapped=rest == "proj.weight")
        return
    rest = rest.removeprefix("block.")
    if rest in _BLOCK:
        yield prefix + _BLOCK[rest], Part(name, shape)
        return
    owner, _, leaf = rest.rpartition(".")
    if owner == "ffn.experts":
        for expert in range(shape[0]):
            yield from _mlp(f"{prefix}mlp.experts.{expert}.", name, leaf, shape[1:], (expert,))
    else:
        yield from _mlp(prefix + _MLPS[owner + "."], name, leaf, shape, ())


def _mlp(
    prefix: str, name: str, leaf: str, shape: tuple[int, ...], index: tuple[int, ...]
) -> Iterator[tuple[str, Part]]:
    if leaf == "w2":
        yield f"{prefix}down_proj.weight", Part(name, shape, index)
        return
    for half, projection in enumerate(("gate_proj", "up_proj")):
        yield f"{prefix}{projection}.weight", Part(name, shape[1:], (*index, half))
