"""Products of narrow matrices with wide results: a bf16 result would round a loss or a gradient at the third digit."""

from typing import Any

import torch


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in fp32 (fp64 operands: in fp64), with no rounding in between."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def mm_into(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
    """`a @ b` into (or added to) a tensor of the operands' dtype or wider, with no rounding in between."""
    if a.dtype != into.dtype and not a.is_cuda:
        return mm_into(into, a.to(into.dtype), b.to(into.dtype), add=add)
    options: dict[str, Any] = {} if a.dtype == into.dtype else {"out_dtype": into.dtype}
    if add:
        torch.addmm(into, a, b, out=into, **options)
    else:
        torch.mm(a, b, out=into, **options)
