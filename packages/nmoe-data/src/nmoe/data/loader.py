"""Shard sets to batches: a shuffled order for training that needs no memory, and plain order for validation."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from nmoe.data.documents import IGNORE_INDEX
from nmoe.data.errors import ArgumentError, PlanError, TokenRangeError, TooFewTokensError
from nmoe.data.permutation import permute
from nmoe.data.plan import Plan
from nmoe.data.schedule import Schedule
from nmoe.data.shards import ShardSet

_BLOCK = 256
"""Samples whose places are found at once: NumPy's calls cost as much for one."""


class _Source(NamedTuple):
    shards: ShardSet
    name: str | None
    """Draws the order, with seed and epoch; None for a set that is trained on alone."""
    samples_per_epoch: int


class Loader:
    """Training samples in one global order, addressed by a cursor.

    Of one shard set, sample n covers the tokens [n·S, n·S + S + 1): S inputs and, one further on, S targets, so that
    neighbours share a token and every token but the first is a target once an epoch (of what remains after the last
    whole sample, none). Epoch e goes through all samples in its own order, drawn from (seed, e). Of a mixture, each
    source has such an order, drawn from its name too, and the plan's schedule says whose turn it is.

    What a batch holds depends on the tokens, the plan, the seed, S and the cursor alone: not on what was asked before,
    nor on ranks or micro-batches.
    """

    def __init__(self, shards: ShardSet, seq_len: int, seed: int) -> None:
        """Of one shard set. Raises ArgumentError, and TooFewTokensError if there is not a single sample."""
        self._prepare([(shards, None)], None, seq_len, seed)
        self.fingerprint = shards.fingerprint
        """Identifies the tokens and, of a mixture, their order up to the seed."""

    @classmethod
    def of_plan(cls, plan: Plan, sets: Mapping[str, ShardSet], seed: int) -> Self:
        """Of a mixture. Raises ArgumentError if a source's shard set is missing, and as the constructor does."""
        lacking = [name for name in plan.sources if name not in sets]
        if lacking:
            raise ArgumentError("sets", expected="each source's", found=f"none of {lacking}", remedy="Open them.")
        self = cls.__new__(cls)
        self._prepare([(sets[name], name) for name in plan.sources], plan.schedule(), plan.seq_len, seed)
        self.fingerprint = mixture_fingerprint(plan, sets)
        return self

    def _prepare(
        self, sets: Sequence[tuple[ShardSet, str | None]], schedule: Schedule | None, seq_len: int, seed: int
    ) -> None:
        _check_positive("seq_len", seq_len)
        self._sources = [_Source(shards, name, samples_of(shards, seq_len)) for shards, name in sets]
        self._schedule, self._seq_len, self._seed = schedule, seq_len, seed
        self._n_samples = None if schedule is None else schedule.n_samples
        self._block: tuple[int, list[int], list[int]] | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the order is drawn anew, of all sources together."""
        return sum(source.samples_per_epoch for source in self._sources)

    @property
    def n_samples(self) -> int | None:
        """Samples that there are over all epochs; None: without end."""
        return self._n_samples

    def batch(self, cursor: int, count: int) -> npt.NDArray[np.int64]:
        """Samples `cursor` to `cursor + count - 1` of the order, as int64 (count, S + 1).

        The cursor counts on over the epochs. Raises ArgumentError, PlanError beyond the plan's last sample, and
        TokenRangeError for an id that the set's tokenizer does not have.
        """
        if cursor < 0 or count < 0:
            raise ArgumentError(
                "batch", expected="a cursor and a count of 0 or more", found=f"{cursor}, {count}", remedy="Pass such."
            )
        if self._n_samples is not None and cursor + count > self._n_samples:
            raise PlanError(
                "batch",
                expected=f"samples under the plan's {self._n_samples:,}",
                found=f"{cursor + count - 1:,}",
                remedy="Lower train.steps, or raise the flow's tokens.",
            )
        out = np.empty((count, self._seq_len + 1), np.int64)
        for row in range(count):
            shards, start = self._place(cursor + row)
            shards.read_into(out[row], start)
        if count and out.max() >= min(source.shards.n_vocab for source in self._sources):
            self._refuse_foreign_ids(cursor, out)
        return out

    def _place(self, sample: int) -> tuple[ShardSet, int]:
        """The shard set of a global sample, and its first token there."""
        number, place = divmod(sample, _BLOCK)
        block = self._block
        if block is None or block[0] != number:
            first = number * _BLOCK
            count = _BLOCK if self._n_samples is None else min(_BLOCK, self._n_samples - first)
            block = self._block = (number, *self._find(first, count))
        return self._sources[block[1][place]].shards, block[2][place]

    def _find(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """Source and first token of the global samples from `first` on."""
        if self._schedule is None:
            source, index = np.zeros(count, np.int64), np.arange(first, first + count)
        else:
            source, index = self._schedule.locate(first, count)
        starts = np.empty(count, np.int64)
        for number, (_, name, size) in enumerate(self._sources):
            mine = np.flatnonzero(source == number)
            epoch, position = np.divmod(index[mine], size)
            for each in np.unique(epoch).tolist():
                of_epoch = epoch == each
                starts[mine[of_epoch]] = permute(position[of_epoch], size, self._seed, each, name) * self._seq_len
        return source.tolist(), starts.tolist()

    def _refuse_foreign_ids(self, cursor: int, sample_BS1: npt.NDArray[np.int64]) -> None:
        for row, sample_S1 in enumerate(sample_BS1):
            shards, start = self._place(cursor + row)
            foreign = np.flatnonzero(sample_S1 >= shards.n_vocab)
            if foreign.size:
                raise TokenRangeError(
                    str(shards.file_of(start + int(foreign[0]))),
                    expected=f"token ids under {shards.n_vocab}",
                    found=str(sample_S1[foreign[0]]),
                    remedy="Verify the set (n data verify --checksums), or prepare it again.",
                )


def samples_of(shards: ShardSet, seq_len: int) -> int:
    """Samples of S + 1 tokens in a set. Raises TooFewTokensError if there is not one."""
    samples = (shards.n_tokens - 1) // seq_len
    if samples < 1:
        raise TooFewTokensError(
            str(shards.path),
            expected=f"at least {seq_len + 1} tokens, one sample",
            found=f"{shards.n_tokens}",
            remedy="Lower train.seq_len, or prepare more text.",
        )
    return samples


def mixture_fingerprint(plan: Plan, sets: Mapping[str, ShardSet]) -> str:
    """SHA-256 of the tokens of every source, its name, and what of the plan decides the order."""
    content = {"version": 1, "sources": {name: sets[name].fingerprint for name in plan.sources}, **plan.identity()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ArgumentError(name, expected="1 or more", found=repr(value), remedy="Raise it.")
