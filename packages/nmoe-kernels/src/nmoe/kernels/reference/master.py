"""fp32 masters of bf16 weights in 16 bits: the weight and a residual that together give the master back, exactly.

The bf16 weight is the master's upper half after rounding to nearest (halfway cases away from zero); the residual is
what rounding left, as a signed 16-bit integer of the bit pattern. `master_bits = (weight_bits << 16) + residual`.
"""

import torch


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An fp32 tensor as (bf16 weight, int16 residual). Finite values only."""
    bits = master.contiguous().view(torch.int32)
    # Rounding half up in the bit pattern keeps the residual within int16; half to even would need one value more.
    upper = (bits + 0x8000) >> 16
    residual = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), residual.to(torch.int16)


def join_master(weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The fp32 tensor that `split_master` took apart."""
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + residual
    return bits.view(torch.float32)


def load_master(weight: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The master of a weight; a weight without a residual is its own."""
    return weight if residual is None else join_master(weight, residual)


def store_master(master: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Puts a master back into the weight and the residual that it was loaded from, or into others of its shape."""
    if residual is not None:
        upper, rest = split_master(master)
        weight.copy_(upper)
        residual.copy_(rest)
    elif master is not weight:
        weight.copy_(master)
