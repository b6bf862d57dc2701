"""The log of a run as a picture. Needs the extra `plots`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What each part of the picture shows: its axis, and keys of the log with what they are called.
PARTS: dict[str, dict[str, str]] = {
    "cross entropy, nats": {"ce": "training text"},
    "KL divergence, nats": {"kl": "training text, from full precision"},
    "share of codes": {
        "flip_rate": "changed since the last row",
        "zero_fraction": "zero",
        "clip_fraction": "outside their grid",
    },
}


def plot_log(log_path: Path, picture_path: Path) -> None:
    """Cross entropy and divergence on axes of their own, held-out text beside the training text,
    with lines at full precision and at the start of training, and what the codes do. The report of
    the run is read beside its log."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log_path.read_text().splitlines()]
    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(len(PARTS), 1, sharex=True)
    for axis, (label, names) in zip(axes, PARTS.items(), strict=True):
        for key, name in names.items():
            _draw(axis, _points(rows, key), label=name)
        axis.set_ylabel(label)
    held_out = [(x, math.log(y)) for x, y in _points(rows, "held_out_perplexity")]
    _draw(axes[0], held_out, label="held-out text", marker="o", color="black", linestyle="none")
    styles = {"full_precision": "-", "start": "--"}
    for name, value in _references(log_path.with_name("report.json")).items():
        label = f"held-out text, {name.replace('_', ' ')}"
        axes[0].axhline(value, label=label, color="gray", linestyle=styles[name])
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("step")
    figure.savefig(picture_path)


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _draw(axis: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _references(report_path: Path) -> dict[str, float]:
    """Cross entropy on held-out text before training: of full precision, and of the start."""
    if not report_path.is_file():
        return {}
    held_out = json.loads(report_path.read_text()).get("held_out") or {}
    known = ("full_precision", "start")
    return {name: math.log(held_out[name]["perplexity"]) for name in known if name in held_out}
