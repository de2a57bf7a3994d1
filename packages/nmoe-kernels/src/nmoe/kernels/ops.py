"""The table of ops that a model and a trainer call, and the one place that chooses the tier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.errors import UnsupportedArchError

Tier = Literal["reference", "native"]


@dataclass(frozen=True)
class Ops:
    """Ops of one tier. Each one's arguments and shapes stand in the module under `reference` that is named here.

    The types of a routing and of an index are the tier's own: an op takes what its tier's other ops give.
    """

    tier: Tier
    attention: Callable[..., torch.Tensor]
    """`attention`"""
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """`norm`: x, gain and epsilon to the normed x."""
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """`norm`: x, what is added to it or None, gain and epsilon to the sum and its norm."""
    qkv_heads: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """`qkv`: plain attention's product to what `attention` takes."""
    mla_heads: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """`mla`: MLA's projections to what `attention` takes."""
    route: Callable[..., Any]
    """`routing`: logits and bias to a routing with `expert_TK` and `gate_TK`."""
    index_rows: Callable[[Any, int], Any]
    """`routing`: a routing and the number of experts to an index with `offset_E`."""
    balance_loss: Callable[..., torch.Tensor]
    """`balance`: logits and chosen experts to the weighted loss, summed over sequences."""
    experts: Callable[..., torch.Tensor]
    """`experts`: x, index, gates, w13 and w2 to the gated sum of each token's experts."""
    rope: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """`rope`: heads (B, S, H, d), cos and sin to the turned heads."""
    swiglu: Callable[[torch.Tensor], torch.Tensor]
    """`swiglu`: gate and up side by side to their SwiGLU."""
    linear_cross_entropy: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """`cross_entropy`: rows, head and targets to the sum of the rows' losses."""
    adamw_: Callable[..., None]
    """`adamw`"""
    global_norm: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """`global_norm`"""
    muon_momentum_: Callable[..., torch.Tensor]
    """`muon`: gradient and momentum to what is orthogonalised."""
    newton_schulz: Callable[..., torch.Tensor]
    """`newton_schulz`"""
    muon_apply_: Callable[..., None]
    """`muon`: the orthogonalised update into the weight."""


def select_ops(tier: Tier, device: torch.device | str) -> Ops:
    """Ops of `tier` for `device`. There is no fallback from one tier to the other.

    Raises:
        UnsupportedArchError: the native tier has no kernels for the device; the message names the remedy.
    """
    if tier == "reference":
        return _reference_ops()
    if torch.device(device).type != "cuda":
        raise UnsupportedArchError(
            f"expected a CUDA device for runtime.kernels = 'native', found '{device}': "
            "set runtime.kernels = 'reference'"
        )
    arch = detect_arch(device)
    if arch not in NATIVE_ARCHES:
        raise UnsupportedArchError(
            f"expected one of {', '.join(NATIVE_ARCHES)} for runtime.kernels = 'native', found {arch} "
            f"({torch.cuda.get_device_name(device)}): set runtime.kernels = 'reference'"
        )
    return _native_ops(arch)


def _reference_ops() -> Ops:
    from nmoe.kernels.reference.adamw import adamw_
    from nmoe.kernels.reference.attention import attention
    from nmoe.kernels.reference.balance import balance_loss
    from nmoe.kernels.reference.cross_entropy import linear_cross_entropy
    from nmoe.kernels.reference.experts import GroupedGemms, experts
    from nmoe.kernels.reference.global_norm import global_norm
    from nmoe.kernels.reference.grouped_gemm import grouped_gemm, grouped_wgrad
    from nmoe.kernels.reference.mla import mla_heads
    from nmoe.kernels.reference.muon import muon_apply_, muon_momentum_
    from nmoe.kernels.reference.newton_schulz import newton_schulz
    from nmoe.kernels.reference.norm import add_rms_norm, rms_norm
    from nmoe.kernels.reference.qkv import qkv_heads
    from nmoe.kernels.reference.rope import rope
    from nmoe.kernels.reference.routing import index_rows, route
    from nmoe.kernels.reference.swiglu import swiglu

    return Ops(
        tier="reference",
        attention=attention,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        qkv_heads=qkv_heads,
        mla_heads=mla_heads,
        route=route,
        index_rows=lambda routing, n_experts: index_rows(routing.expert_TK, n_experts),
        balance_loss=balance_loss,
        experts=partial(experts, GroupedGemms(grouped_gemm, grouped_wgrad)),
        rope=rope,
        swiglu=swiglu,
        linear_cross_entropy=linear_cross_entropy,
        adamw_=adamw_,
        global_norm=global_norm,
        muon_momentum_=muon_momentum_,
        newton_schulz=newton_schulz,
        muon_apply_=muon_apply_,
    )


def _native_ops(arch: str) -> Ops:
    from nmoe.kernels.native.adamw_cuda import adamw_
    from nmoe.kernels.native.attention import attention
    from nmoe.kernels.native.balance_cuda import balance_loss
    from nmoe.kernels.native.cross_entropy_cuda import score_rows
    from nmoe.kernels.native.global_norm_cuda import global_norm
    from nmoe.kernels.native.mla_triton import mla_heads
    from nmoe.kernels.native.muon_cuda import muon_apply_, muon_momentum_
    from nmoe.kernels.native.newton_schulz_triton import newton_schulz
    from nmoe.kernels.native.norm import add_rms_norm, rms_norm
    from nmoe.kernels.native.qkv_triton import qkv_heads
    from nmoe.kernels.native.rope_triton import rope
    from nmoe.kernels.native.routing_cuda import index_rows, route
    from nmoe.kernels.native.swiglu_triton import swiglu
    from nmoe.kernels.reference.cross_entropy import linear_cross_entropy

    return Ops(
        tier="native",
        attention=attention,
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        qkv_heads=qkv_heads,
        mla_heads=mla_heads,
        route=route,
        index_rows=lambda routing, n_experts: index_rows(routing.expert_TK, n_experts, routing.histogram_BE),
        balance_loss=balance_loss,
        experts=_hopper_experts() if arch == "sm_90a" else _blackwell_experts(),
        rope=rope,
        swiglu=swiglu,
        linear_cross_entropy=partial(linear_cross_entropy, score_rows=score_rows),
        adamw_=adamw_,
        global_norm=global_norm,
        muon_momentum_=muon_momentum_,
        newton_schulz=newton_schulz,
        muon_apply_=muon_apply_,
    )


def _hopper_experts() -> Callable[..., torch.Tensor]:
    from nmoe.kernels.native.experts_cuda import experts

    return experts


def _blackwell_experts() -> Callable[..., torch.Tensor]:
    from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm, grouped_wgrad
    from nmoe.kernels.reference.experts import GroupedGemms, experts

    return partial(experts, GroupedGemms(grouped_gemm, grouped_wgrad))
