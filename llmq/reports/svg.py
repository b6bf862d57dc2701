"""Pictures for a page, as SVG that stands in the HTML itself: nothing is loaded, and colours are
those of the page (`currentColor` and its variables), light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 60, 16, 12, 34
ROW = 30  # height of an interval's row
LABELS = 236  # width of the names of intervals
N_COLOURS = 4


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval, None where nothing is known of its spread."""

    label: str
    value: float
    interval: tuple[float, float] | None

    @property
    def is_finite(self) -> bool:
        """Whether there is a place for it."""
        return all(map(math.isfinite, (self.value, *(self.interval or ()))))


@dataclass(frozen=True)
class Line:
    """Points `(x, y)` from left to right. dots: they are marked, too, for points that lie far
    apart."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Spot:
    """A point with its name, and the 95% interval of y, None where nothing is known of it."""

    x: float
    y: float
    interval: tuple[float, float] | None
    name: str


@dataclass(frozen=True)
class Group:
    """Points of one colour."""

    label: str
    spots: Sequence[Spot]


@dataclass(frozen=True)
class Axis:
    """Of values from `low` to `high` on `start` to `stop` of the picture."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers inside, at most so many and at least one."""
        span = (self.high - self.low) or abs(self.low) or 1.0
        step = 10.0 ** math.floor(math.log10(span / most))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= most)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)] or [self.low]


def spread(values: Iterable[float], margin: float = 0.06) -> tuple[float, float]:
    """The range of values with a margin; of one value, something around it."""
    values = list(values)
    low, high = min(values), max(values)
    width = (high - low) or abs(low) * 0.1 or 1.0
    return low - margin * width, high + margin * width


def number(value: float) -> str:
    """Short, for an axis."""
    return f"{value:.4g}"


def intervals(rows: Sequence[Interval], reference: float, caption: str) -> str:
    """Values with their intervals, a row each, beside a line at what would be no loss."""
    ends = [end for row in rows for end in (row.interval or (row.value, row.value))]
    low, high = spread([*ends, reference])
    axis = Axis(low, high, LABELS, WIDTH - RIGHT)
    height = TOP + ROW * len(rows) + BOTTOM
    parts = [*_bottom_axis(axis, height), _mark(axis.place(reference), height)]
    for index, row in enumerate(rows):
        y, x = TOP + ROW * (index + 0.5), axis.place(row.value)
        parts.append(f'<text x="{LABELS - 10}" y="{y + 4:.1f}" class="end">{escape(row.label)}')
        parts.append("</text>")
        if row.interval is not None:
            x1, x2 = map(axis.place, row.interval)
            parts.append(f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" class="bar"/>')
        title = escape(f"{row.label}: {number(row.value)}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" class="c0"><title>{title}</title>')
        parts.append("</circle>")
    return _svg(height, caption, parts)


def lines(
    drawn: Sequence[Line], references: dict[str, float], caption: str, height: int = 220
) -> str:
    """Lines over a common x, with dashed lines across at named heights, and a legend below."""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + list(references.values())
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    up = Axis(*spread(ys), height - BOTTOM, TOP)
    parts = [*_bottom_axis(across, height), *_left_axis(up)]
    for name, value in references.items():
        y = up.place(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"')
        parts.append(f' class="dashed"/><text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" class="end">')
        parts.append(f"{escape(name)}</text>")
    for index, line in enumerate(drawn):
        colour = f"c{index % N_COLOURS}"
        places = [(across.place(x), up.place(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="line {colour}"/>')
        for x, y in places if line.dots or len(places) == 1 else ():
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{colour}"/>')
    return _svg(height, caption, parts) + _legend(drawn)


def scatter(
    groups: Sequence[Group], path: Sequence[tuple[float, float]], across: str, up: str
) -> str:
    """Points with positive y on a logarithmic axis, and a dashed path through some of them."""
    height = 360
    spots = [spot for group in groups for spot in group.spots]
    ends = [end for spot in spots for end in (spot.y, *(spot.interval or ()))]
    xs = Axis(*spread([spot.x for spot in spots]), LEFT, WIDTH - RIGHT)
    lowest = min(spot.y for spot in spots) / 10  # of intervals that reach zero
    logs = [math.log10(max(end, lowest)) for end in ends]
    ys = Axis(*spread(logs), height - BOTTOM - 16, TOP + 16)
    parts = [*_bottom_axis(xs, height - 16), *_log_axis(ys)]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" class="end">{escape(across)}</text>')
    parts.append(f'<text x="4" y="{TOP}">{escape(up)}</text>')
    places = " ".join(f"{xs.place(x):.1f},{ys.place(math.log10(y)):.1f}" for x, y in path)
    parts.append(f'<polyline points="{places}" class="front"/>')
    beside = iter(corners([(xs.place(spot.x), ys.place(math.log10(spot.y))) for spot in spots]))
    for index, group in enumerate(groups):
        colour = f"c{index % N_COLOURS}"
        for spot in group.spots:
            x, y = xs.place(spot.x), ys.place(math.log10(spot.y))
            if spot.interval is not None:
                y1, y2 = (ys.place(math.log10(max(end, lowest))) for end in spot.interval)
                parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"')
                parts.append(f' class="{colour}"/>')
            title = escape(f"{spot.name}, {group.label}: {number(spot.y)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{colour}">')
            right, down = next(beside)
            place = f'x="{x + 8:.1f}"' if right > 0 else f'x="{x - 8:.1f}" class="end"'
            parts.append(f"<title>{title}</title></circle>")
            parts.append(f'<text {place} y="{y + (14 if down > 0 else -5):.1f}">')
            parts.append(f"{escape(spot.name)}</text>")
    legend = _legend([Line(group.label, ()) for group in groups])
    return _svg(height, f"{up} against {across}", parts) + legend


Corner = tuple[int, int]
"""Where a name stands beside its point: to the right or left (1, -1), below or above (1, -1)."""

CORNERS: tuple[Corner, ...] = ((1, -1), (-1, 1), (1, 1), (-1, -1))


def corners(
    places: Sequence[tuple[float, float]],
    width: float = WIDTH,
    size: tuple[float, float] = (84, 15),
) -> list[Corner]:
    """Where names stand, one after the other: the first corner at which a name would neither lie
    over an earlier one nor end outside. places: in pixels, y downwards. width: of the picture.
    size: of a name."""
    found: list[Corner] = []
    boxes: list[tuple[float, float]] = []  # their middles
    for x, y in places:
        middles = {
            (right, down): (x + right * (8 + size[0] / 2), y + down * size[1] / 2 + down * 2)
            for right, down in CORNERS
        }
        free = [
            corner
            for corner, (u, v) in middles.items()
            if u + size[0] / 2 <= width
            and not any(abs(u - a) < size[0] and abs(v - b) < size[1] for a, b in boxes)
        ]
        found.append(free[0] if free else CORNERS[0])
        boxes.append(middles[found[-1]])
    return found


def _log_axis(axis: Axis) -> list[str]:
    """Lines at 1, 2 and 5 times powers of ten, of an axis of logarithms."""
    parts = []
    for power in range(math.floor(axis.low), math.ceil(axis.high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**power
            if axis.low <= math.log10(value) <= axis.high:
                y = axis.place(math.log10(value))
                parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"')
                parts.append(f' class="grid"/><text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">')
                parts.append(f"{number(value)}</text>")
    return parts


def _bottom_axis(axis: Axis, height: float) -> list[str]:
    y = height - BOTTOM
    parts = [f'<line x1="{axis.start}" x2="{axis.stop}" y1="{y}" y2="{y}" class="axis"/>']
    for value in axis.ticks():
        x = axis.place(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" class="middle">{number(value)}</text>')
    return parts


def _left_axis(axis: Axis) -> list[str]:
    parts = []
    for value in axis.ticks(4):
        y = axis.place(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"')
        parts.append(f' class="grid"/><text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">')
        parts.append(f"{number(value)}</text>")
    return parts


def _mark(x: float, height: float) -> str:
    bottom = height - BOTTOM
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="dashed"/>'


def _legend(drawn: Sequence[Line]) -> str:
    names = [
        f'<span><i class="c{index % N_COLOURS}"></i>{escape(line.label)}</span>'
        for index, line in enumerate(drawn)
    ]
    return f'<p class="legend">{" ".join(names)}</p>'


def _svg(height: float, caption: str, parts: Sequence[str]) -> str:
    label = escape(caption, quote=True)
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{body}</svg>'
