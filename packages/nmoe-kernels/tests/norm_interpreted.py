"""Runs the Triton RMSNorm in Triton's interpreter: `TRITON_INTERPRET=1 python norm_interpreted.py IN OUT`.

A case has `x` and `dout` (R, D) and `weight`, fp32 of bf16's values. x lies in rows that are 16 longer. Results, fp32:
`out`, `dx` and `dweight`, the last not rounded.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native import norm_triton


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradients of one case, by three programs at most in the backward."""
    norm_triton._PROGRAMS = 3
    x, weight, dout = (torch.from_numpy(case[name]).bfloat16() for name in ("x", "weight", "dout"))
    whole = torch.nn.functional.pad(x, (0, 16), value=float("nan")).requires_grad_()
    weight.requires_grad_()
    weight.main_grad, weight.main_grad_stale = torch.zeros(weight.shape), True
    out = norm_triton.rms_norm(whole[:, : x.shape[1]], weight, float(case["eps"]))
    out.backward(dout)
    assert weight.grad is None
    dx = whole.grad[:, : x.shape[1]]
    return {"out": out.detach().float().numpy(), "dx": dx.float().numpy(), "dweight": weight.main_grad.numpy()}


if __name__ == "__main__":
    run_cases(run)
