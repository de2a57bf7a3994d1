"""Runs the Triton Newton-Schulz in Triton's interpreter: `TRITON_INTERPRET=1 python …_interpreted.py IN OUT`.

A case has either `x` (Q, M, N) and `tall`, of which it gives `gram`, and of that `polynomial` with `factors`; or
`matrices` and `steps`, of which it gives `out`. Floats are fp32 of bf16's values.
"""

import numpy as np
import torch
from grouped_gemm_interpreted import teach_bf16
from interpreted import run_cases
from nmoe.kernels.native import newton_schulz_triton as module


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The results of one case."""
    if "matrices" in case:
        out = module.newton_schulz(torch.from_numpy(case["matrices"]).bfloat16(), steps=int(case["steps"]))
        return {"out": out.float().numpy()}
    x, tall = torch.from_numpy(case["x"]).bfloat16(), bool(case["tall"])
    m, n = x.shape[:0:-1] if tall else x.shape[1:]
    guarded = torch.full((2, len(x) + 1, m, m), 12345.0).bfloat16()
    gram, polynomial = guarded[0, :-1], guarded[1, :-1]
    tile = module._tile(x.device)
    module._symmetric(x, gram, m, n, (1.0, 0.0, 0.0), tile, tall=tall, own=False)
    module._symmetric(gram, polynomial, m, m, tuple(case["factors"].tolist()), tile, tall=False, own=True)
    return {"gram": guarded[0].float().numpy(), "polynomial": guarded[1].float().numpy()}


if __name__ == "__main__":
    teach_bf16()
    run_cases(run)
