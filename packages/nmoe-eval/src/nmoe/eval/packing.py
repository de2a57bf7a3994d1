"""Score requests as rows of tokens, and rows as batches: what sequences share is there once.

A request is the sequence of its context and all of its continuation but the last token, which is only predicted. Sorted
as words in a dictionary, sequences that begin alike are neighbours; a row holds as many neighbours as gain by it, as a
tree (see `nmoe.model.branches`). Everything here depends on the requests alone, so all ranks plan the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from nmoe.eval.errors import RequestError
from nmoe.eval.requests import ScoreRequest

_LEAST_BRANCHES, _BRANCHES_PER_TRUNK = 1024, 4
"""How many tokens may follow a row's trunk: what is behind it is attended to through a mask, at a square's cost."""


@dataclass(frozen=True)
class Scored:
    """One request's tokens after cropping."""

    request: int
    tokens: tuple[int, ...]
    """What the model is given."""
    targets: tuple[int, ...]
    """What it is to predict, the last so many tokens of the sequence and the one after it."""
    n_cropped: int

    @property
    def first(self) -> int:
        """The place of the token whose state predicts the first target."""
        return len(self.tokens) - len(self.targets)


@dataclass(frozen=True)
class Row:
    """Sequences that are neighbours, each with how many tokens it shares with the one before it."""

    sequences: tuple[Scored, ...]
    shared: tuple[int, ...]
    """The first is 0."""

    @cached_property
    def n_tokens(self) -> int:
        """Places in the row."""
        return sum(len(each.tokens) - shared for each, shared in zip(self.sequences, self.shared, strict=True))

    @cached_property
    def trunk(self) -> int | None:
        """Tokens before the first branch; None: there is no branch."""
        # A sequence that goes on where the one before it ends branches off nothing.
        borders = [
            shared
            for (before, _), shared in zip(pairwise(self.sequences), self.shared[1:], strict=True)
            if shared < len(before.tokens)
        ]
        return min(borders) if borders else None


@dataclass(frozen=True)
class PackedBatch:
    """Rows side by side, as arrays of one forward call."""

    token_BS: np.ndarray
    """int64."""
    position_BS: np.ndarray
    until_BS: np.ndarray
    trunk: int
    place_P: np.ndarray
    """int64: places, counted through all rows, whose states predict something, in ascending order; several targets may
    have one place."""
    target_P: np.ndarray
    """int64: what they predict."""
    request_P: np.ndarray
    """int64: for which request."""


def scored(requests: Sequence[ScoreRequest], max_length: int) -> list[Scored]:
    """What the model is given for each request, cropped from the left to `max_length` tokens.

    Raises:
        RequestError: a context or a continuation is empty, or a continuation does not fit.
    """
    found = []
    for number, request in enumerate(requests):
        if not request.context or not request.continuation:
            empty = "continuation" if request.context else "context"
            raise RequestError(f"request {number}: expected at least one token of {empty}, found none")
        if len(request.continuation) > max_length:
            raise RequestError(
                f"request {number}: expected a continuation of at most {max_length} tokens, which is what the model "
                f"sees at once, found {len(request.continuation)}: leave its example out"
            )
        whole = request.context + request.continuation[:-1]
        cropped = max(0, len(whole) - max_length)
        found.append(Scored(number, whole[cropped:], request.continuation, cropped + request.n_cropped))
    return found


def rows_of(sequences: Sequence[Scored], max_tokens: int) -> list[Row]:
    """Puts neighbours together. A sequence joins the row before it if what they share is at least half as long as what
    it adds, if the row stays within `max_tokens`, and if its branches stay few beside their trunk."""
    rows: list[Row] = []
    members: list[Scored] = []
    shares: list[int] = []
    size = trunk = 0
    for each in sorted(sequences, key=lambda each: (each.tokens, each.request)):
        if members:
            shared = _n_shared(members[-1].tokens, each.tokens)
            added = len(each.tokens) - shared
            if trunk == size == shared:  # there is no branch yet, and this one goes on where all before it end
                new_trunk = len(each.tokens)
            else:
                new_trunk = trunk if shared == len(members[-1].tokens) else min(trunk, shared)
            few = size + added - new_trunk <= max(_LEAST_BRANCHES, _BRANCHES_PER_TRUNK * new_trunk)
            if added == 0 or (2 * shared >= added and size + added <= max_tokens and few):
                members.append(each)
                shares.append(shared)
                size, trunk = size + added, new_trunk
                continue
            rows.append(Row(tuple(members), tuple(shares)))
        members, shares, size, trunk = [each], [0], len(each.tokens), len(each.tokens)
    if members:
        rows.append(Row(tuple(members), tuple(shares)))
    return rows


def batches_of(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows by length, the longest first, as many at once as fit: rows times the longest is at most `max_tokens`."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (-row.n_tokens, row.sequences[0].request)):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].n_tokens <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pack(rows: Sequence[Row]) -> PackedBatch:
    """The arrays of a batch."""
    width = max(row.n_tokens for row in rows)
    shape = (len(rows), width)
    token_BS, position_BS = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    until_BS = np.full(shape, width, np.int64)
    places, targets, requests = [], [], []
    trunk = width
    for number, row in enumerate(rows):
        if row.trunk is not None:
            trunk = min(trunk, row.trunk)
        path = np.zeros(0, np.int64)  # where the tokens of the sequence at hand stand in the row
        end = 0
        for each, shared in zip(row.sequences, row.shared, strict=True):
            # The one before goes no further than what this one shares with it: nobody after sees the rest.
            until_BS[number, path[shared:]] = end
            new = np.arange(end, end + len(each.tokens) - shared)
            token_BS[number, new] = each.tokens[shared:]
            position_BS[number, new] = np.arange(shared, len(each.tokens))
            path, end = np.concatenate((path[:shared], new)), end + len(new)
            places.append(number * width + path[each.first :])
            targets.append(each.targets)
            requests.append(np.full(len(each.targets), each.request))
        until_BS[number, path] = end
    place_P = np.concatenate(places)
    order_P = np.argsort(place_P, kind="stable")
    return PackedBatch(
        token_BS,
        position_BS,
        until_BS,
        trunk,
        place_P[order_P],
        np.concatenate([np.array(each, np.int64) for each in targets])[order_P],
        np.concatenate(requests)[order_P],
    )


def _n_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    low, high = 0, most  # the first `low` are the same, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
