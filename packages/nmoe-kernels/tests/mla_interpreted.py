"""Runs the Triton kernels of MLA's heads in the interpreter: `TRITON_INTERPRET=1 python mla_interpreted.py IN OUT`.

A case has `q`, `kv`, `k_rope`, `dq`, `dk` and `dv`, fp32 of bf16's values; `cos` and `sin`; and `order`, the gradients'
dimensions from the outermost in memory. A gradient that is left out is undefined. Results: the outputs `q_out`, `k_out`
and `v_out`, and the gradients `q_grad`, `kv_grad` and `k_rope_grad`, as fp32.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.mla_triton import mla_heads


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients of one case."""
    given = {name: torch.from_numpy(array) for name, array in case.items()}
    inputs = [given[name].bfloat16().requires_grad_() for name in ("q", "kv", "k_rope")]
    outputs = mla_heads(*inputs, given["cos"], given["sin"])
    order = given["order"].tolist()
    back = [order.index(dim) for dim in range(4)]
    pairs = [
        (output, given[name].bfloat16().permute(order).contiguous().permute(back))
        for name, output in zip(("dq", "dk", "dv"), outputs, strict=True)
        if name in given
    ]
    grads = torch.autograd.grad([output for output, _ in pairs], inputs, [grad for _, grad in pairs])
    names = ("q_out", "k_out", "v_out", "q_grad", "kv_grad", "k_rope_grad")
    results = zip(names, (*outputs, *grads), strict=True)
    return {name: tensor.detach().float().contiguous().numpy() for name, tensor in results}


if __name__ == "__main__":
    run_cases(run)
