"""Which part of a grouped product a CTA computes: a table found on an H200, chosen by shape.

`python -m nmoe.kernels.bench tiles --shapes …` times every candidate and prints the lines for `TABLE`.
Letters: D model width, F expert width.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the product that a CTA computes at a time; 32,768 fill its registers."""

    m: int
    n: int


WIDE, TALL = Tile(128, 256), Tile(256, 128)

CANDIDATES = {
    "up": (WIDE,),  # gate and up side by side: fewer gathered rows for the same product
    "down": (WIDE, TALL),
    "dgrad_activation": (WIDE, TALL),
    "dgrad_input": (WIDE, TALL),
    "wgrad_down": (WIDE, TALL),
    "wgrad_up": (WIDE, TALL),
}
"""Tiles that each product may use: what `nmoe.kernels.compile` builds."""

TABLE: dict[tuple[str, int, int], Tile] = {}
"""(product, D, F) to the fastest tile, where it is not the one that pads least."""


def choose_tile(product: str, width: int, hidden: int) -> Tile:
    """The tile for a product at D and F: the table's, else the one that computes the fewest padded columns, and of
    equal ones the wide one."""
    listed = TABLE.get((product, width, hidden))
    if listed is not None:
        return listed
    return min(CANDIDATES[product], key=lambda tile: _padded(product, tile, width, hidden))


def _padded(product: str, tile: Tile, width: int, hidden: int) -> int:
    """Columns of the product's output that its tiles cover, times their rows where weights have both."""
    if product == "wgrad_down":
        return _up_to(width, tile.m) * _up_to(hidden, tile.n)
    if product == "wgrad_up":
        return _up_to(2 * hidden, tile.m) * _up_to(width, tile.n)
    if product == "dgrad_activation":
        return _up_to(hidden, tile.n)
    return _up_to(width, tile.n)


def _up_to(n: int, step: int) -> int:
    return -(-n // step) * step
