"""Grouped matrix products through PyTorch's CUTLASS kernels; offsets are read on the device.

Shapes: R rows, e experts, N and M widths.
"""

import torch
import torch.nn.functional as F


def grouped_gemm(a_RN: torch.Tensor, weight_eNM: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """Row r of expert e times `weight[e]`: bf16 (R, N) to (R, M)."""
    return F.grouped_mm(a_RN, weight_eNM, offs=offset_E[1:])


def grouped_wgrad(a_RM: torch.Tensor, b_RN: torch.Tensor, offset_E: torch.Tensor, into_eMN: torch.Tensor) -> None:
    """Adds `a[rows of e]ᵀ @ b[rows of e]` to `into[e]`.

    The product of one call is rounded to bf16 before it is added: PyTorch's kernel gives no wider output.
    """
    into_eMN.add_(F.grouped_mm(a_RM.t(), b_RN, offs=offset_E[1:]))
