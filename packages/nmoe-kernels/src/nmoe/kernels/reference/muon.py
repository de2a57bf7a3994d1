"""What Muon does before and after its orthogonalisation (`newton_schulz`): Nesterov momentum, and the update."""

import torch
from nmoe.kernels.reference.adamw import assign_master_
from nmoe.kernels.reference.master import load_master
from nmoe.kernels.reference.predicate import assign_


def muon_momentum_(
    grad: torch.Tensor, momentum: torch.Tensor, grad_scale: torch.Tensor, ok: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """The momentum becomes `beta · momentum + (1 - beta) · scaled gradient`; the result is that sum once more, of the
    new momentum (Nesterov's). Every operation rounds by itself, in this order, in both tiers.

    Args:
        grad: fp32, contiguous; left as it is.
        momentum: fp32, of its shape, contiguous; changed in place.
        grad_scale: fp32 scalar on the device; multiplies the gradient (clipping).
        ok: int32 scalar on the device; 0: the momentum keeps its bits, and the result is worth nothing.
        beta: of the momentum; `1 - beta` is the gradient's part.

    Returns:
        Of the gradient's shape: bf16 on GPUs, whose matrix units `newton_schulz` needs; elsewhere as the momentum is.
    """
    scaled = grad * grad_scale
    moved = momentum + (scaled - momentum) * (1 - beta)
    assign_(momentum, moved, ok)
    ahead = moved - (moved - scaled) * (1 - beta)
    return ahead.bfloat16() if ahead.is_cuda else ahead


def muon_apply_(
    weight: torch.Tensor, residual: torch.Tensor | None, update: torch.Tensor, ok: torch.Tensor, scalars: torch.Tensor
) -> None:
    """`weight · decay - update · step_size` in place, on the master. Every operation rounds by itself in both tiers.

    Args:
        weight: fp32, or bf16 with `residual`; contiguous, as all others.
        residual: int16 (see `nmoe.kernels.reference.master`), or None for fp32 weights.
        update: what `newton_schulz` gave of `muon_momentum_`'s result, of the weight's shape.
        ok: int32 scalar on the device; 0: nothing changes, whatever the update holds.
        scalars: fp32 (2) on the device: decay and step_size.
    """
    decay, step_size = scalars.unbind()
    master = load_master(weight, residual)
    assign_master_(weight, residual, master * decay - update.to(master.dtype) * step_size, ok)
