"""Runs `add_router_gradient` in Triton's interpreter: `TRITON_INTERPRET=1 python router_interpreted.py IN OUT`.

The interpreter is chosen when a kernel's module is imported, so it has a process of its own. Both files are `.npz`.
A case has fp32 arrays `<case>/addend`, `gradient` (T, E) and `weight`, which are cast to bf16; the gradient's second
part is NaN, and so is what lies in memory after each operand. Results are `<case>/out`, in fp32, and `<case>/beyond`,
what lies after it: zeros, if nothing was written there.
"""

from typing import Any
from unittest import mock

import numpy as np
import torch
from grouped_gemm_interpreted import teach_bf16
from interpreted import run_cases
from nmoe.kernels.native.router_triton import add_router_gradient
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

ROOM = 1 << 14
"""Elements: more than a tile of the interpreter reaches beyond the last row of a case."""


def teach_rounding() -> None:
    """The interpreter cuts fp32 off to bf16: makes it round to nearest even, as the hardware does."""
    truncate = InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: Any, value: TensorHandle, to: Any) -> TensorHandle:
        if (value.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, value, to)
        rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def with_room(tensor: torch.Tensor, filled: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor at the start of a longer memory, and the rest of that memory, which is filled with one number."""
    memory = torch.full((tensor.numel() + ROOM,), filled, dtype=tensor.dtype)
    memory[: tensor.numel()] = tensor.flatten()
    return memory[: tensor.numel()].view(tensor.shape), memory[tensor.numel() :]


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The results of one case."""
    addend, gradient, weight = (torch.from_numpy(case[name]).bfloat16() for name in ("addend", "gradient", "weight"))
    parts = torch.stack((gradient, torch.full_like(gradient, torch.nan)), 1)
    operands = [with_room(tensor, torch.nan)[0] for tensor in (addend, parts, weight)]
    memory, beyond = with_room(torch.full_like(addend, torch.nan), 0.0)
    with mock.patch("torch.empty_like", return_value=memory):
        out = add_router_gradient(*operands)
    return {"out": out.float().numpy(), "beyond": beyond.float().numpy()}


if __name__ == "__main__":
    teach_bf16()
    teach_rounding()
    run_cases(run)
