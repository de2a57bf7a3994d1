"""Runs the Triton SwiGLU in Triton's interpreter: `TRITON_INTERPRET=1 python swiglu_interpreted.py IN OUT`.

A case has `pre` and `dout`, fp32 of bf16's values. Results, likewise: `out` and `dpre`.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.swiglu_triton import swiglu


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradient of one case."""
    pre = torch.from_numpy(case["pre"]).bfloat16().requires_grad_()
    out = swiglu(pre)
    out.backward(torch.from_numpy(case["dout"]).bfloat16())
    return {"out": out.detach().float().numpy(), "dpre": pre.grad.float().numpy()}


if __name__ == "__main__":
    run_cases(run)
