"""Places in buffers: nobody's twice, each rank's pieces equal, whole parameters where asked for, costs even."""

from itertools import pairwise
from math import prod

import pytest
from nmoe.train.layout import ALIGNMENT, cut_anywhere, side_by_side, whole_parameters
from nmoe.train.muon import newton_schulz_cost

SHAPES = {
    **{f"a{i}": (8, 24) for i in range(7)},
    **{f"b{i}": (2, 24, 8) for i in range(5)},
    **{f"c{i}": (40, 40) for i in range(3)},
    "d": (3, 5),
    "e": (100, 7),
}
RANKS = (2, 3, 4, 8, 16)


def layouts(kind, ranks, chunk_size=2000):
    if kind == "cut":
        return [cut_anywhere(SHAPES, ranks=ranks, rank=rank, chunk_size=chunk_size) for rank in range(ranks)]
    return [
        whole_parameters(SHAPES, newton_schulz_cost, ranks=ranks, rank=rank, chunk_size=chunk_size)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["cut", "whole"])
def test_every_element_has_one_place_and_one_rank(kind, ranks):
    all_ranks = layouts(kind, ranks)
    first = all_ranks[0]
    assert all((one.starts, one.chunks) == (first.starts, first.chunks) for one in all_ranks)
    places = sorted((start, start + prod(SHAPES[name])) for name, start in first.starts.items())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
    assert places[-1][1] <= first.size
    assert first.starts.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        parts = sorted(part for layout in all_ranks for part in layout.parts(name, prod(shape)))
        reached = 0
        for part in parts:
            assert part.start == reached
            reached += part.size
        assert reached == prod(shape)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["cut", "whole"])
def test_pieces_are_aligned_and_a_shard_is_this_ranks_pieces_in_a_row(kind, ranks):
    for layout in layouts(kind, ranks):
        reached = 0
        for span, chunk in zip(layout.spans(), layout.chunks, strict=True):
            assert span.start == chunk.start + layout.rank * chunk.piece
            assert (span.at, span.size) == (reached, chunk.piece)
            assert span.start % ALIGNMENT == span.at % ALIGNMENT == 0
            reached += span.size
        assert reached == layout.shard_size == layout.size // ranks
        ends = [chunk.start + ranks * chunk.piece for chunk in layout.chunks]
        assert [chunk.start for chunk in layout.chunks] == [0, *ends[:-1]]


@pytest.mark.parametrize("ranks", RANKS)
def test_chunks_are_bounded(ranks):
    """A bound of 2000 elements; each of a chunk's pieces may be an alignment longer, or hold one parameter."""
    for chunk in layouts("cut", ranks)[0].chunks:
        assert chunk.piece * ranks <= 2000 + ranks * ALIGNMENT
    for chunk in layouts("whole", ranks)[0].chunks:
        assert chunk.piece <= max(2000 // ranks, 40 * 40)
    assert len(layouts("cut", ranks, 10**9)[0].chunks) == len(layouts("whole", ranks, 10**9)[0].chunks) == 1


@pytest.mark.parametrize("ranks", RANKS)
def test_muons_parameters_are_whole_and_costs_are_even(ranks):
    all_ranks = layouts("whole", ranks)
    costs = [0.0] * ranks
    for name, shape in SHAPES.items():
        (owner,) = [layout.rank for layout in all_ranks if list(layout.parts(name, prod(shape)))]
        costs[owner] += newton_schulz_cost(shape)
    assert max(costs) - min(costs) <= max(map(newton_schulz_cost, SHAPES.values()))
    assert sum(costs) == sum(map(newton_schulz_cost, SHAPES.values()))


def test_equal_parameters_fill_pieces_without_gaps():
    """Sixteen of a shape on four ranks: nothing is filled up but to the alignment."""
    shapes = {f"{kind}{i}": shape for i in range(16) for kind, shape in (("a", (8, 24)), ("b", (16, 16)))}
    layout = whole_parameters(shapes, newton_schulz_cost, ranks=4, rank=0, chunk_size=10**6)
    assert layout.size == sum(map(prod, shapes.values()))


def test_one_rank_has_all_in_one_chunk():
    layout = side_by_side(SHAPES)
    assert [span.size for span in layout.spans()] == [layout.size]
    assert [part.start for part in layout.parts("e", 700)] == [0]
    assert list(layout.starts) == sorted(SHAPES, key=lambda name: SHAPES[name][-2:]), "equal matrices side by side"
