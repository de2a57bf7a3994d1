"""Runs the Triton `score_rows` in its interpreter: `TRITON_INTERPRET=1 python cross_entropy_interpreted.py IN OUT`.

A case has `logits` (C, V) in fp32 and `target` (C) in int64. Results in fp32: `nll` and `dlogits`, each with a guard of
one element after the last, and `alone`: the losses where no gradient is wanted.
"""

from typing import Any

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native.cross_entropy_triton import score_rows
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

GUARD = 12345.0


def teach_rounding() -> None:
    """The interpreter cuts fp32 off to bf16; a device rounds to the nearest."""
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: TensorHandle, kind: Any) -> TensorHandle:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = cast_impl


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The result of one case."""
    logits, target = torch.from_numpy(case["logits"]), torch.from_numpy(case["target"])
    rows, size = len(target), logits.numel()
    nll, dlogits = torch.full((rows + 1,), GUARD), torch.full((size + 1,), GUARD).bfloat16()
    score_rows(logits, target, nll[:rows], dlogits[:size].view_as(logits))
    alone = torch.full((rows,), GUARD)
    score_rows(logits, target, alone, None)
    return {"nll": nll.numpy(), "dlogits": dlogits.float().numpy(), "alone": alone.numpy()}


if __name__ == "__main__":
    teach_rounding()
    run_cases(run)
