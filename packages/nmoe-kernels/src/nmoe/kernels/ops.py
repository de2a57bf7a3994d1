"""The table of ops that a model and a trainer call, and the one place that chooses the tier."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from nmoe.kernels.arch import NATIVE_ARCHES, detect_arch
from nmoe.kernels.errors import UnsupportedArchError

Tier = Literal["reference", "native"]


@dataclass(frozen=True)
class Ops:
    """Ops of one tier. Each field's signature and shapes stand in the module under `reference` of the same name."""

    tier: Tier
    attention: Callable[..., torch.Tensor]
    grouped_gemm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    grouped_wgrad: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    adamw_: Callable[..., None]


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
    return _native_ops()


def _reference_ops() -> Ops:
    from nmoe.kernels.reference.adamw import adamw_
    from nmoe.kernels.reference.attention import attention
    from nmoe.kernels.reference.grouped_gemm import grouped_gemm, grouped_wgrad

    return Ops("reference", attention, grouped_gemm, grouped_wgrad, adamw_)


def _native_ops() -> Ops:
    from nmoe.kernels.native.adamw_triton import adamw_
    from nmoe.kernels.native.attention_cudnn import attention
    from nmoe.kernels.native.grouped_gemm_torch import grouped_gemm, grouped_wgrad

    return Ops("native", attention, grouped_gemm, grouped_wgrad, adamw_)
