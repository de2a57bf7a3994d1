"""Shard sets to batches: a shuffled order for training that needs no memory, and plain order for validation."""

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from nmoe.data.errors import ArgumentError, TokenRangeError, TooFewTokensError
from nmoe.data.shards import ShardSet

IGNORE_INDEX = -100
"""The target of padding: adds nothing to a loss."""


class Loader:
    """Training samples in one global order, addressed by a cursor.

    Sample n covers the tokens [n·S, n·S + S + 1): S inputs and, one further on, S targets, so that neighbours share a
    token and every token but the first is a target once an epoch (of what remains after the last whole sample, none).
    Epoch e goes through all samples in its own order, drawn from (seed, e). What a batch holds depends on the tokens,
    the seed, S and the cursor alone: not on what was asked before, nor on ranks or micro-batches.
    """

    def __init__(self, shards: ShardSet, seq_len: int, seed: int) -> None:
        """Raises ArgumentError, and TooFewTokensError if there is not a single sample."""
        _check_positive("seq_len", seq_len)
        self.samples_per_epoch = (shards.n_tokens - 1) // seq_len
        """Samples before the order is drawn anew."""
        if self.samples_per_epoch < 1:
            raise TooFewTokensError(
                str(shards.path),
                expected=f"at least {seq_len + 1} tokens, one sample",
                found=f"{shards.n_tokens}",
                remedy="Lower train.seq_len, or prepare more text.",
            )
        self._shards = shards
        self._seq_len = seq_len
        self._seed = seed

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens: the shard set's fingerprint."""
        return self._shards.fingerprint

    def batch(self, cursor: int, count: int) -> npt.NDArray[np.int64]:
        """Samples `cursor` to `cursor + count - 1` of the order, as int64 (count, S + 1).

        The cursor counts on over the epochs. Raises ArgumentError, and TokenRangeError for an id that the set's
        tokenizer does not have.
        """
        if cursor < 0 or count < 0:
            raise ArgumentError(
                "batch", expected="a cursor and a count of 0 or more", found=f"{cursor}, {count}", remedy="Pass such."
            )
        out = np.empty((count, self._seq_len + 1), np.int64)
        row = 0
        while row < count:
            epoch, first = divmod(cursor + row, self.samples_per_epoch)
            stop = min(self.samples_per_epoch, first + count - row)
            for sample in permute(np.arange(first, stop), self.samples_per_epoch, self._seed, epoch).tolist():
                out[row] = self._shards.tokens(sample * self._seq_len, self._seq_len + 1)
                row += 1
        if count and out.max() >= self._shards.n_vocab:
            raise TokenRangeError(
                str(self._shards.path),
                expected=f"token ids under {self._shards.n_vocab}",
                found=str(out.max()),
                remedy="Verify the set (n data verify), or prepare it again.",
            )
        return out


def rank_slice(cursor: int, batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """A rank's share of the global batch of `batch_size` samples at `cursor`: its own cursor, and its count.

    Shares are equal, contiguous and in rank order. Raises ArgumentError if they cannot be.
    """
    if world < 1 or not 0 <= rank < world or batch_size < 1 or batch_size % world:
        raise ArgumentError(
            "rank_slice",
            expected="a rank under world, and a batch size that world divides",
            found=f"rank {rank}, world {world}, batch size {batch_size}",
            remedy="Set train.batch_size to a multiple of the ranks.",
        )
    share = batch_size // world
    return cursor + rank * share, share


def validation_batches(
    shards: ShardSet, seq_len: int, batch: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The whole set as pairs of inputs and targets, int64 (b, S) with b ≤ `batch`, every token a target exactly once.

    The inputs are EOS and all tokens but the last, in order; after the end, inputs are EOS and targets -100. Raises
    ArgumentError.
    """
    _check_positive("seq_len", seq_len)
    _check_positive("batch", batch)
    return _validation_batches(shards, seq_len, batch)


def _validation_batches(
    shards: ShardSet, seq_len: int, batch: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    previous = shards.eos_id
    for start in range(0, shards.n_tokens, batch * seq_len):
        tokens = shards.tokens(start, min(batch * seq_len, shards.n_tokens - start))
        rows = -(-tokens.size // seq_len)
        targets = np.full(rows * seq_len, IGNORE_INDEX, np.int64)
        targets[: tokens.size] = tokens
        inputs = np.full(rows * seq_len, shards.eos_id, np.int64)
        inputs[0] = previous
        inputs[1 : tokens.size] = tokens[:-1]
        previous = int(tokens[-1])
        yield inputs.reshape(rows, seq_len), targets.reshape(rows, seq_len)


def permute(positions: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a permutation of 0 to `size - 1`, drawn from (seed, epoch), sends `positions`.

    A keyed Feistel network over the smallest power of two that holds `size`; what it sends outside goes through again
    until it falls inside (cycle walking), which keeps it one to one. Nothing is stored, and any position costs the
    same. A change here would reorder the data of every run that resumes.
    """
    keys = np.frombuffer(hashlib.sha512(f"nmoe order 1 {seed} {epoch}".encode()).digest(), "<u8")
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


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ArgumentError(name, expected="1 or more", found=repr(value), remedy="Raise it.")
