"""AdamW with decoupled weight decay (arXiv:1711.05101), on fp32 weights or on bf16 weights with a 16-bit residual.

What changes from step to step lies on the device, so that an update can be captured in a CUDA graph.
"""

import torch
from nmoe.kernels.reference.master import load_master, split_master
from nmoe.kernels.reference.predicate import assign_

_CHUNK = 1 << 24
"""Elements updated at a time: bounds the temporaries, and changes no bits."""


def adamw_scalars(
    *, lr: float, beta1: float, beta2: float, weight_decay: float, step: int
) -> tuple[float, float, float]:
    """What `adamw_` takes as `scalars`, in double precision: the factor that decays weights, the learning rate over the
    first moment's bias correction, and the square root of the second moment's.

    Args:
        lr: learning rate.
        beta1: of the first moment.
        beta2: of the second moment.
        weight_decay: decoupled.
        step: updates so far, this one included; from 1.
    """
    return 1 - lr * weight_decay, lr / (1 - beta1**step), float((1 - beta2**step) ** 0.5)


def adamw_(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor,
    ok: torch.Tensor,
    scalars: torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Updates weight (and residual) and both moments in place.

    Every operation rounds by itself, in this order, in both tiers: same bits, whatever the tensors' sizes and whichever
    tier, on one GPU. (On a CPU, MKL's square root may be a unit off.)

    Args:
        weight: fp32, or bf16 with `residual`; contiguous, as all others.
        residual: int16 (see `nmoe.kernels.reference.master`), or None for fp32 weights.
        grad: fp32; left as it is.
        exp_avg: fp32 first moment.
        exp_avg_sq: fp32 second moment.
        grad_scale: fp32 scalar on the device; multiplies the gradient (clipping).
        ok: int32 scalar on the device; 0: nothing changes, whatever the gradient holds.
        scalars: fp32 (3) on the device: see `adamw_scalars`.
        beta1: of the first moment.
        beta2: of the second moment.
        eps: added to the root of the second moment, corrected.
    """
    decay, step_size, second_moment_scale = scalars.unbind()
    flat = [tensor.view(-1).split(_CHUNK) for tensor in (weight, grad, exp_avg, exp_avg_sq)]
    rests = [None] * len(flat[0]) if residual is None else residual.view(-1).split(_CHUNK)
    for (part, grad_part, mean, square), rest in zip(zip(*flat, strict=True), rests, strict=True):
        scaled = grad_part * grad_scale
        new_mean = mean + (scaled - mean) * (1 - beta1)
        new_square = square * beta2 + scaled * (1 - beta2) * scaled
        denominator = new_square.sqrt() / second_moment_scale + eps
        master = load_master(part, rest) * decay - new_mean * step_size / denominator
        assign_(mean, new_mean, ok)
        assign_(square, new_square, ok)
        assign_master_(part, rest, master, ok)


def assign_master_(weight: torch.Tensor, residual: torch.Tensor | None, master: torch.Tensor, ok: torch.Tensor) -> None:
    """Puts a master into the weight and its residual (see `nmoe.kernels.reference.master`) unless `ok` is 0."""
    if residual is None:
        assign_(weight, master, ok)
        return
    upper, rest = split_master(master)
    assign_(weight, upper, ok)
    assign_(residual, rest, ok)
