"""SwiGLU (arXiv:2002.05202) with a backward that keeps only the pre-activation.

Shapes: T rows, F hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F


def swiglu_forward(pre_T2F: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for rows that hold gate and up side by side: (T, 2F) to (T, F)."""
    gate_TF, up_TF = pre_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def swiglu_backward(dout_TF: torch.Tensor, pre_T2F: torch.Tensor) -> torch.Tensor:
    """Gradient of the pre-activation, (T, 2F), from the output's, (T, F)."""
    gate_TF, up_TF = pre_T2F.chunk(2, dim=-1)
    dpre_T2F = torch.empty_like(pre_T2F)
    dgate_TF, dup_TF = dpre_T2F.chunk(2, dim=-1)
    dgate_TF.copy_(torch.ops.aten.silu_backward(dout_TF * up_TF, gate_TF))
    torch.mul(dout_TF, F.silu(gate_TF), out=dup_TF)
    return dpre_T2F


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_T2F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre_T2F)
        return swiglu_forward(pre_T2F)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (pre_T2F,) = ctx.saved_tensors
        return swiglu_backward(grads[0], pre_T2F)


def swiglu(pre_T2F: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, (…, 2F) to (…, F); autograd keeps the pre-activation and nothing else."""
    return _SwiGLU.apply(pre_T2F)
