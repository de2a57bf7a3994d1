"""Runs the Triton grouped products in Triton's interpreter: `TRITON_INTERPRET=1 python …_interpreted.py IN OUT`.

The interpreter is chosen when a kernel's module is imported, so it has a process of its own. Both files are `.npz`.
A case has arrays `<case>/<argument>`: those of `grouped_gemm` (`weight`, or `weight_eMN` where it is a transposed view)
or of `grouped_wgrad` (with `into`, and `add`). Floats are given as fp32 and cast to bf16, except `into`, whose last
element is a guard. Results are fp32: `<case>/out` or `<case>/into`.
"""

from typing import Any

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.grouped_gemm_triton import grouped_gemm, grouped_wgrad
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl


def teach_bf16() -> None:
    """The interpreter holds bf16 as uint16, and its dot multiplies those patterns: makes them fp32 first."""
    dot = InterpreterBuilder.create_dot

    def widen(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The result of one case."""
    given = {name: torch.from_numpy(array) for name, array in case.items()}
    offset = given["offset"]
    if "into" not in given:
        weight = given["weight_eMN"].bfloat16().mT if "weight_eMN" in given else given["weight"].bfloat16()
        return {"out": grouped_gemm(given["a"].bfloat16(), weight, offset, row_R=given.get("row")).float().numpy()}
    a, b = given["a"].bfloat16(), given["b"].bfloat16()
    into = given["into"][:-1].view(len(offset) - 1, a.shape[1], b.shape[1])
    rows = {"a_row_R": given.get("a_row"), "b_row_R": given.get("b_row")}
    grouped_wgrad(a, b, offset, into, add=bool(given["add"]), **rows)
    return {"into": given["into"].numpy()}


if __name__ == "__main__":
    teach_bf16()
    run_cases(run)
