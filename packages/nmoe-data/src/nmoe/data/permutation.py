"""A keyed permutation: any place of a shuffled order for the same small cost, and no memory."""

import hashlib

import numpy as np
import numpy.typing as npt


def permute(
    positions: npt.NDArray[np.int64], size: int, seed: int, epoch: int, source: str | None = None
) -> npt.NDArray[np.int64]:
    """Where a permutation of 0 to `size - 1`, drawn from (seed, epoch, source), sends `positions`.

    A keyed Feistel network over the smallest power of two that holds `size`; what it sends outside goes through again
    until it falls inside (cycle walking), which keeps it one to one. Nothing is stored, and any position costs the
    same. A change here would reorder the data of every run that resumes.
    """
    key = f"nmoe order 1 {seed} {epoch}" + ("" if source is None else f" {source}")
    keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    masks = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)

    def encrypt(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        halves = [value & masks[0], value >> low_bits]
        for number, key in enumerate(keys):
            side = number % 2
            halves[side] = halves[side] ^ (_mix(halves[1 - side] ^ key) & masks[side])
        return (halves[1] << low_bits) | halves[0]

    out = encrypt(positions.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = encrypt(out[outside])
    return out.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # SplitMix64's finalizer: every bit of the input reaches the low bits, which are the ones kept.
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
