"""A run's loss as a curve of characters."""

import math
from collections.abc import Sequence

_ASCII = str.maketrans({"─": "-", "│": "|", "┌": "+", "┐": "+", "└": "+", "┘": "+", "┤": "|", "┬": "+"})
Points = Sequence[tuple[int, float]]
"""(step, loss) each, by rising step."""


def loss_curve(
    train: Points, validation: Points = (), *, width: int = 80, height: int = 16, unicode: bool = True
) -> str:
    """The curve of the training loss, with a mark at each validation loss, as lines without colours.

    Args:
        train: losses of single steps; more than fit in `width` are averaged, so that the curve shows the trend, and
            those that are not finite are left out.
        validation: drawn as marks.
        width: characters a line.
        height: lines.
        unicode: whether the output may hold more than ASCII.

    Returns:
        Lines joined by line breaks; empty where there are fewer than two training points.
    """
    train = [point for point in train if math.isfinite(point[1])]
    if len(train) < 2:
        return ""
    # plotext is a singleton: everything that shows is set anew here.
    import plotext

    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear.all()
    figure.plot_size(width, height)
    steps, losses = zip(*_averaged(train, 2 * width), strict=True)
    curve = figure.signal(steps, losses, marker="braille" if unicode else "*")
    curve.lines()
    figure.draw(curve)
    validation = [point for point in validation if math.isfinite(point[1])]
    if validation:
        figure.draw(figure.signal(*zip(*validation, strict=True), marker="o"))
    ticks = _ticks(train[0][0], train[-1][0])
    figure.ruler("x").ticks(ticks, [str(tick) for tick in ticks])
    figure.title("training loss by step" + (", validation at o" if validation else ""))
    text = plotext.uncolorize(str(figure.build()))
    lines = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
    return lines if unicode else lines.translate(_ASCII)


def _averaged(points: Points, most: int) -> Points:
    """At most `most` points, each the mean of as many neighbours."""
    size = -(-len(points) // most)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(group[len(group) // 2][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def _ticks(first: int, last: int) -> list[int]:
    """Steps to name on the axis: at most seven, at multiples of 1, 2 or 5 times a power of ten."""
    gap = 1
    while (last - first) / gap > 6:
        gap = gap * 5 // 2 if str(gap)[0] == "2" else gap * 2
    return list(range(-(-first // gap) * gap, last + 1, gap))
