"""What the CUDA kernels of attention's backward read, and what they write.

Shapes: B batch, H heads, S positions, d and v columns of keys and values.
"""

import math
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One backward. bf16 tensors are as `attention_tiles_triton.for_tma` gives them."""

    dout_BHSv: torch.Tensor
    """Gradient of the output."""
    q_BHSd: torch.Tensor
    k_BHSd: torch.Tensor
    v_BHSv: torch.Tensor
    level_BHS: torch.Tensor
    """fp32, contiguous, that forward gave."""
    delta_BHS: torch.Tensor
    """fp32, contiguous: the sum of a query's output times its gradient."""
    scale: float
    """Of the scores."""
    window: int
    """How many keys a query sees, itself included; S or more: all up to itself."""
    start_BS: torch.Tensor | None
    """int32, contiguous: the first key that a query may see, were there no window; None: no documents."""
    last_BS: torch.Tensor | None
    """int32, contiguous: the last query that may see a key, likewise; None as `start_BS` is."""

    @property
    def exponent(self) -> float:
        """Of 2: a score times this."""
        return self.scale * math.log2(math.e)


class Gradients(NamedTuple):
    """Written, as `attention_tiles_triton.empty_heads` makes them."""

    dq_BHSd: torch.Tensor
    dk_BHSd: torch.Tensor
    dv_BHSv: torch.Tensor
