"""Runs the Triton kernels of plain attention's heads in the interpreter: `TRITON_INTERPRET=1 python qkv_interpreted.py
IN OUT`.

A case has `qkv` and the gradients that are defined of `dq`, `dk` and `dv`, fp32 of bf16's values; `q_gain` and `k_gain`
too, if heads are normed; `cos`, `sin`, `eps`; and `order`, the gradients' dimensions from the outermost in memory.
Results, fp32: the outputs `q`, `k` and `v`, the gradient `dqkv`, and of gains `dq_gain` and `dk_gain`, not rounded.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native import qkv_triton


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients of one case, by three programs at most in the backward."""
    qkv_triton._PROGRAMS = 3
    given = {name: torch.from_numpy(array) for name, array in case.items()}
    qkv = given["qkv"].bfloat16().requires_grad_()
    gains = [given[name].bfloat16().requires_grad_() for name in ("q_gain", "k_gain") if name in given]
    for gain in gains:
        gain.main_grad, gain.main_grad_stale = torch.full(gain.shape, torch.nan), True
    outputs = qkv_triton.qkv_heads(qkv, tuple(gains) or None, float(case["eps"]), given["cos"], given["sin"])
    order = given["order"].tolist()
    back = [order.index(dim) for dim in range(4)]
    pairs = [
        (output, given[name].bfloat16().permute(order).contiguous().permute(back))
        for name, output in zip(("dq", "dk", "dv"), outputs, strict=True)
        if name in given
    ]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    assert all(gain.grad is None for gain in gains)
    results = dict(zip(("q", "k", "v"), outputs, strict=True)) | {"dqkv": qkv.grad}
    results |= {name: gain.main_grad for name, gain in zip(("dq_gain", "dk_gain"), gains, strict=False)}
    return {name: tensor.detach().float().contiguous().numpy() for name, tensor in results.items()}


if __name__ == "__main__":
    run_cases(run)
