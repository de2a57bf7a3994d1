"""Runs the Triton AdamW in Triton's interpreter, on CPU: `TRITON_INTERPRET=1 python adamw_interpreted.py IN OUT`.

The interpreter is chosen when a kernel's module is imported, so it has a process of its own. Both files are `.npz`.
Each case has arrays `<case>/weight` (fp32, or int16 patterns of bf16 where there is a residual), `residual`, `grad`,
`exp_avg`, `exp_avg_sq`, `grad_scale`, `scalars` (AdamWStep's fields in order) and `n`: the first n elements are the
parameter, the rest is a guard that must come back as it was.
"""

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.adamw_triton import adamw_
from nmoe.kernels.reference.adamw import AdamWStep

STATE = ("weight", "residual", "exp_avg", "exp_avg_sq")


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state after one update."""
    n = int(case["n"])
    lr, beta1, beta2, eps, decay, step = case["scalars"].tolist()
    state = {name: torch.from_numpy(case[name]) for name in STATE if name in case}
    weight, residual = state["weight"][:n], state.get("residual")
    adamw_(
        weight if residual is None else weight.view(torch.bfloat16),
        None if residual is None else residual[:n],
        torch.from_numpy(case["grad"])[:n],
        state["exp_avg"][:n],
        state["exp_avg_sq"][:n],
        torch.from_numpy(case["grad_scale"]),
        AdamWStep(lr, beta1, beta2, eps, decay, int(step)),
    )
    return {name: tensor.numpy() for name, tensor in state.items()}


if __name__ == "__main__":
    run_cases(run)
