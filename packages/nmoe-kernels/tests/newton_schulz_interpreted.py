"""Runs the Triton Newton-Schulz in Triton's interpreter: `TRITON_INTERPRET=1 python …_interpreted.py IN OUT`.

A case has `x` (Q, M, N) and `tall`, of which it gives `gram`, and of that `polynomial` with `factors`, both divided by
`powers` of the norms that `squares` (Q, parts) make; or `matrices` and `steps`, of which it gives `out`, and the sums
of their parts as `squares`. Floats are fp32, and but for these sums bf16's values.
"""

import numpy as np
import torch
from grouped_gemm_interpreted import teach_bf16
from interpreted import run_cases
from nmoe.kernels.native import newton_schulz_triton as module


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The results of one case."""
    if "matrices" in case:
        matrices = torch.from_numpy(case["matrices"]).bfloat16()
        out = module.newton_schulz(matrices, steps=int(case["steps"]))
        return {"out": out.float().numpy(), "squares": module._squares(matrices).numpy()}
    x, tall = torch.from_numpy(case["x"]).bfloat16(), bool(case["tall"])
    m = x.shape[2 if tall else 1]
    guarded = torch.full((2, len(x) + 1, m, m), 12345.0).bfloat16()
    gram, polynomial = guarded[0, :-1], guarded[1, :-1]
    tile, squares = module._tile(x.device), torch.from_numpy(case["squares"])
    of_gram, of_polynomial = case["powers"].tolist()
    module._symmetric(x, gram, squares, (1.0, 0.0, 0.0), tile, tall=tall, own=False, power=of_gram)
    factors = tuple(case["factors"].tolist())
    module._symmetric(gram, polynomial, squares, factors, tile, tall=False, own=True, power=of_polynomial)
    return {"gram": guarded[0].float().numpy(), "polynomial": guarded[1].float().numpy()}


if __name__ == "__main__":
    teach_bf16()
    run_cases(run)
