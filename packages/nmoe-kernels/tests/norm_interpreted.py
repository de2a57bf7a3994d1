"""Runs the native RMSNorm in Triton's interpreter: `TRITON_INTERPRET=1 python norm_interpreted.py IN OUT`.

A case has `x` and `dout` (R, D) and `weight`, fp32 of bf16's values; `dtotal`, where the residual goes through the op;
and `delta`, where that is added. x lies in rows that are 16 longer. Results, fp32: `out`, `dx`, `dweight`, the last not
rounded, and `total` and `ddelta` where there are any.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native import norm, norm_triton


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients of one case, by three programs of four warps at most in the backward."""
    norm_triton._PROGRAMS = 3
    given = {name: torch.from_numpy(array).bfloat16() for name, array in case.items() if name != "eps"}
    x, weight, eps = given["x"], given["weight"].requires_grad_(), float(case["eps"])
    whole = torch.nn.functional.pad(x, (0, 16), value=float("nan")).requires_grad_()
    weight.main_grad, weight.main_grad_stale = torch.zeros(weight.shape), True
    results = {}
    if "dtotal" in case:
        delta = given["delta"].requires_grad_() if "delta" in case else None
        total, out = norm.add_rms_norm(whole[:, : x.shape[1]], delta, weight, eps)
        torch.autograd.backward((total, out), (given["dtotal"], given["dout"]))
        results["total"] = total.detach()
        if delta is not None:
            results["ddelta"] = delta.grad
    else:
        out = norm.rms_norm(whole[:, : x.shape[1]], weight, eps)
        out.backward(given["dout"])
    assert weight.grad is None
    results |= {"out": out.detach(), "dx": whole.grad[:, : x.shape[1]], "dweight": weight.main_grad}
    return {name: tensor.float().numpy() for name, tensor in results.items()}


if __name__ == "__main__":
    run_cases(run)
