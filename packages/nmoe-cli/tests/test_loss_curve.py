"""The curve shows what it was given."""

import math

import pytest
from nmoe.cli.loss_curve import loss_curve

FALLING = [(step, 4 * math.exp(-step / 200) + 2) for step in range(1, 1001)]


def marks(text, symbols):
    """(column, row) of each symbol inside the frame."""
    return [
        (column, row)
        for row, line in enumerate(text.splitlines())
        for column, symbol in enumerate(line)
        if symbol in symbols
    ]


def inside(text):
    """The lines with the frame's two sides, without the labels around them."""
    return "\n".join(line.split("|", 1)[1] for line in text.splitlines() if line.count("|") == 2)


def test_a_falling_loss_falls():
    drawn = marks(inside(loss_curve(FALLING, unicode=False)), "*")
    mean_row = {column: sum(row for c, row in drawn if c == column) for column, _ in drawn}
    left = [row for column, row in drawn if column < 10]
    right = [row for column, row in drawn if column > 60]
    assert max(left) < min(right) or sum(left) / len(left) < sum(right) / len(right) - 3
    assert len(mean_row) > 60


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("height", [8, 16])
def test_it_keeps_to_its_size(width, height):
    lines = loss_curve(FALLING, [(500, 2.5)], width=width, height=height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_without_unicode_it_is_ascii_and_never_coloured():
    assert loss_curve(FALLING, [(500, 2.5)], unicode=False).isascii()
    assert "\x1b" not in loss_curve(FALLING)


def test_each_validation_has_its_mark():
    text = loss_curve(FALLING, [(250, 5.0), (500, 4.0), (750, 3.0)], unicode=False)
    assert "validation at o" in text
    columns = sorted(column for column, _ in marks(inside(text), "o"))
    assert len(columns) == 3
    assert columns[1] - columns[0] == pytest.approx(columns[2] - columns[1], abs=1)


def test_a_long_run_is_averaged_not_sampled():
    # Steps alternate between 1 and 3: the axis stays near their mean, unless single steps were picked out.
    noisy = [(step, 1.0 + 2 * (step % 2)) for step in range(10_000)]
    labels = [line.split("|")[0].strip() for line in loss_curve(noisy, unicode=False).splitlines()]
    assert all(1.9 < float(label) < 2.1 for label in labels if label[:1].isdigit() and "." in label)
    assert any("." in label for label in labels)


def test_steps_that_diverged_are_left_out():
    assert loss_curve([*FALLING, (1001, math.nan), (1002, math.inf)]) == loss_curve(FALLING)


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, math.nan), (2, 1.0)]])
def test_there_is_no_curve_of_less_than_two_points(points):
    assert loss_curve(points) == ""


def test_calls_do_not_disturb_each_other():
    first = loss_curve(FALLING)
    loss_curve(FALLING[:100], [(50, 3.0)], width=50, height=9, unicode=False)
    assert loss_curve(FALLING) == first


def test_steps_on_the_axis_are_round():
    last = loss_curve(FALLING).splitlines()[-1].split()
    assert [int(tick) for tick in last] == [200, 400, 600, 800, 1000]
