"""Runs the Triton RoPE in Triton's interpreter: `TRITON_INTERPRET=1 python rope_interpreted.py IN OUT`.

A case has `x` and `dout` (B, S, H, d), fp32 of bf16's values, `cos` and `sin`. With `strided`, x lies as (B, H, S, d)
and dout likewise. Results, fp32: `out` and `dx`.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.rope_triton import rope


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradient of one case."""
    x, dout = (torch.from_numpy(case[name]).bfloat16() for name in ("x", "dout"))
    if "strided" in case:
        x, dout = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, dout))
    x.requires_grad_()
    out = rope(x, torch.from_numpy(case["cos"]), torch.from_numpy(case["sin"]))
    out.backward(dout)
    return {"out": out.detach().float().numpy(), "dx": x.grad.float().numpy()}


if __name__ == "__main__":
    run_cases(run)
