"""Pictures as SVG: well-formed, everything inside, names escaped, round numbers on axes."""

from xml.etree import ElementTree

import pytest

from llmq.reports import svg

NAMES = {"n": "http://www.w3.org/2000/svg"}


def parsed(picture):
    return ElementTree.fromstring(picture.partition("<p class")[0])


def test_intervals_lie_where_their_values_are():
    rows = [svg.Interval("a < b", 1.0, (0.5, 1.5)), svg.Interval("c", 2.0, None)]
    root = parsed(svg.intervals(rows, 0.0, "KL & more"))
    assert root.get("aria-label") == "KL & more"
    first, second = (float(dot.get("cx")) for dot in root.iter("circle"))
    (bar,) = (line for line in root.iter("line") if line.get("class") == "bar")
    (zero,) = (line for line in root.iter("line") if line.get("class") == "dashed")
    start, stop = float(bar.get("x1")), float(bar.get("x2"))
    assert float(zero.get("x1")) < start < first < stop < second
    assert first - start == pytest.approx(stop - first, abs=0.2)
    assert second - first == pytest.approx(2 * (first - start), abs=0.3)
    assert "a < b" in [text.text for text in root.iter("text")]


def test_lines_and_what_they_are_compared_with():
    drawn = [svg.Line("loss", [(0, 3.0), (5, 2.0), (10, 1.0)]), svg.Line("one", [(10, 2.0)])]
    picture = svg.lines(drawn, {"full precision": 0.5}, "losses")
    root = parsed(picture)
    whole, single = (line.get("points").split() for line in root.iter("polyline"))
    xs, ys = zip(*(map(float, point.split(",")) for point in whole), strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] < ys[1] < ys[2] < svg.TOP + 220  # down is more
    (mark,) = (line for line in root.iter("line") if line.get("class") == "dashed")
    assert float(mark.get("y1")) > ys[2]
    assert len(list(root.iter("circle"))) == len(single) == 1  # a line of one point is a dot
    assert "</i>loss</span>" in picture


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.49, [0.2, 0.3, 0.4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg.Axis(low, high, 0, 100).ticks() == pytest.approx(expected)


def test_a_single_value_has_room_around_it():
    low, high = svg.spread([2.0])
    assert low < 2 < high


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([(0, 0), (200, 0)], [(1, -1), (1, -1)]),
        ([(0, 0), (10, 5)], [(1, -1), (-1, 1)]),  # over each other
        ([(0, 0), (10, 30)], [(1, -1), (1, -1)]),  # one above the other
        ([(0, 0), (10, 5), (60, 4)], [(1, -1), (-1, 1), (1, 1)]),
        ([(0, 0), (95, 0)], [(1, -1), (1, -1)]),  # where the first name has ended
        ([(600, 50)], [(-1, 1)]),  # it would end outside
        ([(0, 0)] * 5, [(1, -1), (-1, 1), (1, 1), (-1, -1), (1, -1)]),  # there are no more
    ],
)
def test_names_do_not_lie_over_each_other(places, expected):
    assert svg.corners(places) == expected
