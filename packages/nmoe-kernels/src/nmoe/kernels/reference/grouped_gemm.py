"""Grouped matrix products over rows sorted by expert, as a loop over experts.

Shapes: R rows, e experts, N and M widths. `offset_E` is int32 (e + 1).
"""

from itertools import pairwise

import torch
from nmoe.kernels.reference.matmul import mm_into


def grouped_gemm(a_RN: torch.Tensor, weight_eNM: torch.Tensor, offset_E: torch.Tensor) -> torch.Tensor:
    """Row r of expert e times `weight[e]`: (R, N) to (R, M). Reads the offsets on the host."""
    out_RM = a_RN.new_empty(a_RN.shape[0], weight_eNM.shape[2])
    for expert, (start, end) in _ranges(offset_E):
        torch.mm(a_RN[start:end], weight_eNM[expert], out=out_RM[start:end])
    return out_RM


def grouped_wgrad(
    a_RM: torch.Tensor, b_RN: torch.Tensor, offset_E: torch.Tensor, into_eMN: torch.Tensor, *, add: bool
) -> None:
    """`a[rows of e]ᵀ @ b[rows of e]` into `into[e]`, whose dtype may be wider than the operands': added, or instead of
    what is there, which is zeros for an expert without rows."""
    if not add:
        into_eMN.zero_()
    for expert, (start, end) in _ranges(offset_E):
        mm_into(into_eMN[expert], a_RM[start:end].t(), b_RN[start:end], add=True)


def _ranges(offset_E: torch.Tensor) -> list[tuple[int, tuple[int, int]]]:
    pairs = enumerate(pairwise(offset_E.tolist()))
    return [(expert, (start, end)) for expert, (start, end) in pairs if end > start]
