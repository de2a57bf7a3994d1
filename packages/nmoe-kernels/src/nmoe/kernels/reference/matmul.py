"""Products of narrow matrices with wide results: a bf16 result would round a loss or a gradient at the third digit."""

import torch


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in fp32 (fp64 operands: in fp64), with no rounding in between."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def add_mm_wide(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds `a @ b` to `into`, whose dtype is the operands' or wider."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    else:
        into.add_(mm_wide(a, b))
