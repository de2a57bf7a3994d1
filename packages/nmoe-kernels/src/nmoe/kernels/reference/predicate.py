"""Writes that a word on the device may forbid, so that no host need know before it launches them."""

import torch


def assign_(target: torch.Tensor, value: torch.Tensor, ok: torch.Tensor) -> None:
    """`target` becomes `value` unless `ok` is 0; then it keeps its bits, whatever `value` holds.

    Args:
        target: written in place.
        value: of its shape and dtype.
        ok: int32 scalar on its device.
    """
    target.copy_(torch.where(ok != 0, value, target))
