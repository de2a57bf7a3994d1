"""Cases of the optimizer: AdamW, the gradients' norm, Muon's orthogonalisation."""

import torch
from nmoe.kernels.bench.op_case import BF16, FP32, Case, Peer, Run, Setting, Work

_RESIDUAL = 2
"""Bytes of an int16 residual."""
_BETA1, _BETA2, _EPS = 0.9, 0.95, 1e-8


def adamw(count: int, dtype: torch.dtype) -> Case:
    """One update of `count` parameters: bf16 with a residual, or fp32."""
    narrow = dtype == torch.bfloat16

    def make(setting: Setting) -> Run:
        weight = setting.normal(count, dtype=dtype)
        residual = torch.zeros(count, dtype=torch.int16, device=setting.device) if narrow else None
        grad, exp_avg = (setting.normal(count, dtype=torch.float32) for _ in range(2))
        exp_avg_sq = setting.normal(count, dtype=torch.float32).square_()
        grad_scale = torch.ones((), device=setting.device)
        ok = torch.ones((), dtype=torch.int32, device=setting.device)
        # Decay of the weight, step size, and the second moment's scale, after many steps.
        scalars = torch.tensor([1 - 1e-4, 1e-3, 1.0], device=setting.device)

        def run() -> None:
            setting.ops.adamw_(
                weight,
                residual,
                grad,
                exp_avg,
                exp_avg_sq,
                grad_scale,
                ok,
                scalars,
                beta1=_BETA1,
                beta2=_BETA2,
                eps=_EPS,
            )

        return run

    master = BF16 + _RESIDUAL if narrow else FP32
    # Weight, with its residual, and both moments read and written; the gradient read: 28 bytes, bf16 or fp32.
    work = Work(count * (2 * master + FP32 + 2 * 2 * FP32))
    return Case("adamw", "step", f"{count:.0e}".replace("e+0", "e") + (" bf16" if narrow else " fp32"), work, make)


def global_norm(count: int, tensors: int) -> Case:
    """The norm of `tensors` fp32 gradients of `count` elements in all."""

    def make(setting: Setting) -> Run:
        grads = [setting.normal(count // tensors, dtype=torch.float32) for _ in range(tensors)]
        return lambda: setting.ops.global_norm(grads)

    # Each gradient read; one number written.
    work = Work(FP32 * (count // tensors * tensors) + FP32)
    return Case("global_norm", "norm", f"{tensors} of {count // tensors}", work, make)


def newton_schulz(batch: int, rows: int, columns: int, steps: int = 5) -> Case:
    """Muon's iteration on bf16 matrices, beside the same with cuBLAS; FLOP of the full products."""

    def make(setting: Setting) -> Run:
        matrices = setting.normal(batch, rows, columns)
        return lambda: setting.ops.newton_schulz(matrices, steps=steps)

    def plain(setting: Setting) -> Run:
        from nmoe.kernels.reference.newton_schulz import newton_schulz

        matrices = setting.normal(batch, rows, columns)
        return lambda: newton_schulz(matrices, steps=steps)

    short, long = sorted((rows, columns))
    # A step: X·Xᵀ, its square, and their sum times X. A kernel may leave out the mirrored half of the first two: its
    # rate in full products then is above the peak's share that it runs at.
    flop = steps * batch * (2 * 2 * short * short * long + 2 * short**3)
    # Matrices read, their updates written.
    work = Work(2 * BF16 * batch * rows * columns, flop)
    shape = f"{batch} of {rows}x{columns}"
    return Case("newton_schulz", f"{steps} steps", shape, work, make, Peer("cuBLAS", plain))
