"""Runs the Triton balance loss in Triton's interpreter: `TRITON_INTERPRET=1 python balance_interpreted.py IN OUT`.

A case has fp32 `logits` (T, E), int32 `expert` (T, K) and `sequences`, a number. Results: `loss` and `dlogits`, of a
weight and a gradient that `test_balance_triton` names too, and `beyond`, what lies in memory after `dlogits`: zeros, if
nothing was written there. Logits and experts have NaN and an expert of all, 0, in memory after them.
"""

from unittest import mock

import numpy as np
import torch
from interpreted import run_cases
from nmoe.kernels.native import balance_triton

WEIGHT, DLOSS = 0.3, -1.7
ROOM = 4096
"""Elements: more than a tile reaches beyond the last row of a case."""


def with_room(tensor: torch.Tensor, filled: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor at the start of a longer memory, and the rest of that memory, which is filled with one number."""
    memory = torch.full((tensor.numel() + ROOM,), filled, dtype=tensor.dtype)
    memory[: tensor.numel()] = tensor.flatten()
    return memory[: tensor.numel()].view(tensor.shape), memory[tensor.numel() :]


def run(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Loss and gradient of one case."""
    logits, _ = with_room(torch.from_numpy(case["logits"]), torch.nan)
    expert, _ = with_room(torch.from_numpy(case["expert"]), 0)
    gradient, beyond = with_room(torch.full_like(logits, torch.nan), 0.0)
    logits.requires_grad_()
    loss = balance_triton.balance_loss(logits, expert, n_sequences=int(case["sequences"]), weight=WEIGHT)
    with mock.patch("torch.empty_like", return_value=gradient):
        loss.backward(torch.tensor(DLOSS))
    return {"loss": loss.detach().numpy(), "dlogits": logits.grad.numpy(), "beyond": beyond.numpy()}


if __name__ == "__main__":
    # So small that small tensors have several blocks of a sequence, several steps of a block, and every kind of edge.
    balance_triton._PROGRAMS, balance_triton._ELEMENTS, balance_triton._CHOICES = 12, 128, 32
    balance_triton._BINS = 64
    balance_triton._SUM_SIZES = {"ROWS": 2, "COLS": 32}
    run_cases(run)
