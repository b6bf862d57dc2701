"""The ratios of a benchmark as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError


def check_plot(path: str) -> None:
    """Raise `LlmqError` without matplotlib, or for a file of a kind that it does not write: before
    minutes of measurement, not after."""
    if find_spec("matplotlib") is None:
        raise LlmqError(
            "--plot: matplotlib is not installed; pip install '.[plots]' in a clone of llmq"
        )
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in kinds:
        raise LlmqError(
            f"--plot {path}: expected a file that ends in {', '.join('.' + kind for kind in kinds)}"
        )


def ratios(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Speed-up over bfloat16 by rows of x, a line per shape and kind of weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for key in dict.fromkeys((row["weights"], row["n"], row["k"]) for row in rows):
        line = [row for row in rows if (row["weights"], row["n"], row["k"]) == key]
        axes.plot(
            [row["m"] for row in line],
            [row["ratio"] for row in line],
            marker="o",
            label=f"{key[0]}, {key[1]} x {key[2]}",
        )
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="rows of x", ylabel="speed-up over bfloat16")
    axes.legend(fontsize="small")
    figure.savefig(path)
