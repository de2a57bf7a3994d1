"""AdamW in one pass over weight, residual, gradient and moments: 24 bytes a bf16 parameter, 28 an fp32 one."""

import torch
import triton
import triton.language as tl
from nmoe.kernels.reference.adamw import AdamWStep

_BLOCK = 4096


@triton.jit
def _adamw_kernel(
    weight_ptr,
    residual_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_scale_ptr,
    n,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    second_moment_scale,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if SPLIT:
        upper = tl.load(weight_ptr + at, mask=inside, other=0).to(tl.int32)
        rest = tl.load(residual_ptr + at, mask=inside, other=0).to(tl.int32)
        master = ((upper << 16) + rest).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(grad_scale_ptr)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)

    exp_avg += (grad - exp_avg) * one_minus_beta1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * one_minus_beta2
    denominator = tl.sqrt_rn(exp_avg_sq) / second_moment_scale + eps
    master = master * decay - step_size * (exp_avg / denominator)

    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(weight_ptr + at, upper.to(tl.int16), mask=inside)
        tl.store(residual_ptr + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + at, master, mask=inside)


def adamw_(
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad_scale: torch.Tensor,
    scalars: AdamWStep,
) -> None:
    """Updates in place; see `nmoe.kernels.reference.adamw.adamw_` for the arguments."""
    n = weight.numel()
    split = residual is not None
    with torch.cuda.device_of(weight):
        _adamw_kernel[(triton.cdiv(n, _BLOCK),)](
            weight.view(torch.int16) if split else weight,
            residual if split else weight,
            grad,
            exp_avg,
            exp_avg_sq,
            grad_scale,
            n,
            1 - scalars.lr * scalars.weight_decay,
            1 - scalars.beta1,
            scalars.beta2,
            1 - scalars.beta2,
            scalars.eps,
            scalars.step_size,
            scalars.second_moment_scale,
            SPLIT=split,
            BLOCK=_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,  # Triton 3.10 changes the default, and with it the bits of a resumed run
        )
