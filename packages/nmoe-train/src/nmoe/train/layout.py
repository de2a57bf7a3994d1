"""Which place each parameter of a group has in the group's buffers, and which places this rank updates.

A buffer is a row of chunks, each of W equal pieces, one a rank: piece r of every chunk is rank r's. A chunk is what one
collective moves. A rank's own pieces, laid end to end, are its *shard*: what it alone holds has that layout. Where one
rank updates everything there is one chunk of one piece, and the shard is the buffer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import NamedTuple

ALIGNMENT = 64
"""Elements: 128 bytes of 16-bit numbers, 256 of 32-bit ones. Parameters and pieces start at multiples of it."""

Shape = tuple[int, ...]


class Chunk(NamedTuple):
    """What one collective moves."""

    start: int
    """In the buffer, in elements."""
    piece: int
    """Elements of each rank's piece."""


class Span(NamedTuple):
    """A run of elements that this rank updates."""

    start: int
    """In the buffer, or in a parameter, in elements."""
    at: int
    """In the shard."""
    size: int


@dataclass(frozen=True)
class Layout:
    """Places in a group's buffers."""

    starts: Mapping[str, int]
    """Of each parameter, in elements."""
    chunks: tuple[Chunk, ...]
    """One after the other."""
    ranks: int = 1
    """That divide the buffer among themselves."""
    rank: int = 0
    """This one."""

    @property
    def size(self) -> int:
        """Elements of a buffer."""
        return self.ranks * self.shard_size

    @property
    def shard_size(self) -> int:
        """Elements of a shard."""
        return sum(chunk.piece for chunk in self.chunks)

    def spans(self) -> Iterator[Span]:
        """This rank's pieces of the buffer."""
        at = 0
        for chunk in self.chunks:
            yield Span(chunk.start + self.rank * chunk.piece, at, chunk.piece)
            at += chunk.piece

    def parts(self, name: str, size: int) -> Iterator[Span]:
        """Where in a parameter of `size` elements this rank's parts of it are, if it has any."""
        first = self.starts[name]
        for span in self.spans():
            start, stop = max(first, span.start), min(first + size, span.start + span.size)
            if start < stop:
                yield Span(start - first, span.at + start - span.start, stop - start)


def side_by_side(shapes: Mapping[str, Shape]) -> Layout:
    """Parameters one after the other, equal matrices beside each other, all updated here."""
    starts, size = _row(dict(sorted(shapes.items(), key=lambda item: item[1][-2:])))
    return Layout(starts, (Chunk(0, size),))


def cut_anywhere(shapes: Mapping[str, Shape], *, ranks: int, rank: int, chunk_size: int) -> Layout:
    """Parameters one after the other, cut into equal pieces wherever that falls: for updates element by element. They
    keep their order, so that the parameters of a chunk get their gradients at about the same time.

    Args:
        shapes: of the parameters.
        ranks: W.
        rank: this one.
        chunk_size: bound on the elements of a chunk, but for the alignment of its pieces.
    """
    starts, size = _row(shapes)
    n_chunks = -(-size // chunk_size)
    piece = _aligned(-(-size // (n_chunks * ranks)))
    chunks = tuple(Chunk(i * ranks * piece, piece) for i in range(n_chunks))
    return Layout(starts, chunks, ranks, rank)


def whole_parameters(
    shapes: Mapping[str, Shape], cost: Callable[[Shape], float], *, ranks: int, rank: int, chunk_size: int
) -> Layout:
    """Every parameter in one piece, so that one rank has all of it; the ranks' costs are even.

    Of equal parameters each rank gets as many; those that are over go to the rank that has least to do, the costly ones
    first. Pieces are filled up with zeros to the longest one of their chunk.

    Args:
        shapes: of the parameters.
        cost: of updating a parameter.
        ranks: W.
        rank: this one.
        chunk_size: bound on the elements of a chunk, unless one parameter a rank is more.
    """
    starts: dict[str, int] = {}
    chunks: list[Chunk] = []
    start = 0
    for rounds in _bounded(_rounds(shapes, cost, ranks), shapes, chunk_size // ranks):
        of_ranks = [[name for name in names if name is not None] for names in zip(*rounds, strict=True)]
        rows = [_row({name: shapes[name] for name in names}) for names in of_ranks]
        piece = max(size for _, size in rows)
        for r, (places, _) in enumerate(rows):
            starts |= {name: start + r * piece + place for name, place in places.items()}
        chunks.append(Chunk(start, piece))
        start += ranks * piece
    return Layout(starts, tuple(chunks), ranks, rank)


Round = tuple[str | None, ...]
"""A parameter for each rank, or none."""


def _rounds(shapes: Mapping[str, Shape], cost: Callable[[Shape], float], ranks: int) -> Iterator[Round]:
    of_shape: dict[Shape, list[str]] = {}
    for name, shape in shapes.items():
        of_shape.setdefault(tuple(shape), []).append(name)
    over: list[str] = []
    for names in of_shape.values():
        even = len(names) - len(names) % ranks
        for first in range(0, even, ranks):
            yield tuple(names[first : first + ranks])
        over += names[even:]
    loads, taken = [0.0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[float], list[list[str]]]
    for name in sorted(over, key=lambda name: -cost(shapes[name])):
        least = loads.index(min(loads))
        loads[least] += cost(shapes[name])
        taken[least].append(name)
    yield from zip_longest(*taken)


def _bounded(rounds: Iterator[Round], shapes: Mapping[str, Shape], piece_size: int) -> Iterator[list[Round]]:
    """Rounds in lists, each of at most `piece_size` elements a rank, or one round."""
    held: list[Round] = []
    size = 0
    for names in rounds:
        longest = max(_aligned(prod(shapes[name])) for name in names if name is not None)
        if held and size + longest > piece_size:
            yield held
            held, size = [], 0
        held.append(names)
        size += longest
    if held:
        yield held


def _row(shapes: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
    """Parameters one after the other: their starts, and the length of all."""
    starts: dict[str, int] = {}
    size = 0
    for name, shape in shapes.items():
        starts[name] = size
        size += _aligned(prod(shape))
    return starts, size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
