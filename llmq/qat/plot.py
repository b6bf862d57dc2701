"""The log of a run as a picture. Needs the extra `plots`."""

from __future__ import annotations

import json
from pathlib import Path


def plot_log(log_path: Path, picture_path: Path) -> None:
    """Loss and held-out perplexity above, flip rate and zero fraction below."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log_path.read_text().splitlines()]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axis, names in (
        (above, ("loss", "kl", "ce")),
        (below, ("flip_rate", "zero_fraction", "clip_fraction")),
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.legend()
    held_out = [
        (row["step"], row["held_out_perplexity"]) for row in rows if "held_out_perplexity" in row
    ]
    if held_out:
        right = above.twinx()
        right.plot(*zip(*held_out, strict=True), "k.--")
        right.set_ylabel("held-out perplexity")
    below.set_xlabel("step")
    figure.savefig(picture_path)
