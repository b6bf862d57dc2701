"""Which points no other one beats, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.ladder.bench import Point
from llmq.reports import svg, templates

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def front(points: Sequence[Point]) -> list[Point]:
    """Points with the least divergence of all that are no larger, from small to large."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.n_bytes, each.kl)):
        if not found or point.kl < found[-1].kl:
            found.append(point)
    return found


def markdown(points: Sequence[Point]) -> str:
    """A table, the largest first; what no other point beats in bold."""
    best = front(points)
    rows = [
        "| weights | method | MB | perplexity (95%) | KL (95%) | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for point in sorted(points, key=lambda each: -each.n_bytes):
        name = f"**{point.rung.spec}**" if point in best else point.rung.spec
        cells = (
            *(name, point.rung.method, f"{point.n_bytes / 1e6:.1f}"),
            f"{point.loss:+.2%}{_range(point.loss_ci95, '+.2%')}",
            f"{point.kl:.4f}{_range(point.kl_ci95, '.4f')}",
            f"{point.seconds:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _range(ends: tuple[float, float] | None, how: str) -> str:
    return "" if ends is None else f" ({ends[0]:{how}} to {ends[1]:{how}})"


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Divergence against size with intervals, a colour for each method and a line through what
    nothing beats. Needs the extra `plots`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    best = front(points)
    sizes = [point.n_bytes / 1e6 for point in best]
    axis.plot(sizes, [point.kl for point in best], color="lightgray", zorder=0)
    for method in dict.fromkeys(point.rung.method for point in points):
        own = [point for point in points if point.rung.method == method]
        ends = [point.kl_ci95 or (point.kl, point.kl) for point in own]
        below = [max(0.0, point.kl - low) for point, (low, _) in zip(own, ends, strict=True)]
        above = [max(0.0, high - point.kl) for point, (_, high) in zip(own, ends, strict=True)]
        axis.errorbar(
            [point.n_bytes / 1e6 for point in own],
            [point.kl for point in own],
            yerr=[below, above],
            fmt="o",
            capsize=3,
            label=method,
        )
    axis.margins(x=0.12)
    axis.set(yscale="log", xlabel="weight files, MB", ylabel="KL divergence, nats per token")
    for plain in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        plain(LogFormatter(labelOnlyBase=False))
    axis.set_title(title)
    axis.legend()
    figure.draw_without_rendering()  # so that places in pixels are known
    _name(axis, points)
    figure.savefig(path, dpi=120)


def _name(axis: Axes, points: Sequence[Point]) -> None:
    """Specs beside their points, once the axes are what they will be."""
    places = [(point.n_bytes / 1e6, point.kl) for point in points]
    pixels = [(x, -y) for x, y in axis.transData.transform(places).tolist()]
    beside = svg.corners(pixels, axis.bbox.x1)
    for point, place, (right, down) in zip(points, places, beside, strict=True):
        axis.annotate(
            point.rung.spec,
            place,
            xytext=(6 * right, 4 if down < 0 else -12),
            textcoords="offset points",
            ha="left" if right > 0 else "right",
            fontsize="small",
        )


def page(points: Sequence[Point], title: str) -> str:
    """Picture and table as one HTML page that loads nothing."""
    best = front(points)
    groups = [
        svg.Group(
            method,
            [
                svg.Spot(point.n_bytes / 1e6, point.kl, point.kl_ci95, point.rung.spec)
                for point in points
                if point.rung.method == method
            ],
        )
        for method in dict.fromkeys(point.rung.method for point in points)
    ]
    path = [(point.n_bytes / 1e6, point.kl) for point in best]
    return templates.render(
        "sweep.html",
        title=title,
        picture=svg.scatter(groups, path, "megabytes", "KL divergence in nats per token"),
        rows=sorted(points, key=lambda each: -each.n_bytes),
        best=best,
    )
