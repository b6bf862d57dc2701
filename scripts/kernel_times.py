"""Times of kernels as a model of bytes, instructions and programs expects them
(`llmq.benchmark.expected`), beside measured ones.

    python scripts/kernel_times.py scripts/results/kernels-nvidia_h100_80gb_hbm3.json
    python scripts/kernel_times.py gpu-results/kernels.json --fit

A file of results is what `scripts/benchmark_kernels.py` writes, or rows of the same keys. --fit
searches the constants of the card that come nearest to them, from those that it has."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from llmq.benchmark import expected
from llmq.benchmark.expected import CARDS, Card
from llmq.benchmark.kernels import Kind
from llmq_kernels.triton.choices import Choice, Problem, bucket
from llmq_kernels.triton.tuning import choose

FITTED = (
    *("products", "overlap", "bandwidth", "copy_bandwidth", "latency"),
    *("launch", "next_launch", "quantizer", "cublas_launch"),
)
TRIES = 2000
Row = dict[str, Any]


def problem_of(row: Row) -> Problem:
    kind = Kind(row["weights"])
    spec = kind.spec
    is_float = kind.activations == "none"
    m = bucket(row["m"])
    return Problem(
        "float" if is_float else "int8",
        *(spec.bits, max(spec.group_size, 0), "bfloat16", row["n"], row["k"], m),
    )


def expected_of(row: Row, choice: Choice, card: Card) -> tuple[float, float]:
    """Seconds of the product, and how many times faster than bfloat16 it is."""
    seconds = expected.seconds(problem_of(row), choice, card)
    return seconds, expected.bfloat16_seconds(row["n"], row["k"], row["m"], card) / seconds


def errors(rows: Sequence[Row], choices: Sequence[Choice], card: Card) -> list[float]:
    """Logarithms of expected over measured, of all ratios and of the times that are known."""
    found = []
    for row, choice in zip(rows, choices, strict=True):
        seconds, ratio = expected_of(row, choice, card)
        found.append(log(ratio / row["ratio"]))
        if "seconds" in row:
            found.append(log(seconds / row["seconds"]))
    return found


def fitted(rows: Sequence[Row], choices: Sequence[Choice], card: Card) -> Card:
    """The card with the constants of least squares that a random search comes to."""
    rng = random.Random(0)

    def loss(card: Card) -> float:
        return sum(error**2 for error in errors(rows, choices, card))

    best = loss(card)
    for _ in range(TRIES):
        moved = {
            name: getattr(card, name) * exp(rng.gauss(0, 0.05)) for name in rng.sample(FITTED, 2)
        }
        tried = replace(card, **moved)
        if (found := loss(tried)) < best:
            card, best = tried, found
    return card


def table(rows: Sequence[Row], choices: Sequence[Choice], card: Card) -> str:
    """Markdown: expected beside measured ratios over bfloat16, a line per shape."""
    lines = []
    for weights in dict.fromkeys(row["weights"] for row in rows):
        own = [pair for pair in zip(rows, choices, strict=True) if pair[0]["weights"] == weights]
        sizes = sorted({row["m"] for row, _ in own})
        lines += [f"| {weights} | {' | '.join(map(str, sizes))} |", "|---" * (len(sizes) + 1) + "|"]
        for n, k in dict.fromkeys((row["n"], row["k"]) for row, _ in own):
            cells = {
                row["m"]: f"{expected_of(row, choice, card)[1]:.2f} / {row['ratio']:.2f}"
                for row, choice in own
                if (row["n"], row["k"]) == (n, k)
            }
            lines.append(f"| {n} x {k} | {' | '.join(cells.get(m, '') for m in sizes)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--card", choices=CARDS, help="default: the one of the results")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    name = args.card or results["device"]
    if name not in CARDS:
        parser.error(f"no constants of {name}: name the nearest of {', '.join(CARDS)} with --card")
    rows, card = results["rows"], CARDS[name]
    chip = replace(card.chip, name=results["device"])  # whose tuned choices were measured
    choices = [choose(problem_of(row), chip) for row in rows]
    if args.fit:
        card = fitted(rows, choices, card)
        print("\n".join(f"{key}={getattr(card, key):.4g}," for key in FITTED), end="\n\n")
    print(table(rows, choices, card))
    found = sorted(abs(error) for error in errors(rows, choices, card))
    print(
        f"{len(found)} figures; off by {median(found):.1%} (median), "
        f"{found[int(0.9 * len(found))]:.1%} (nine of ten), {found[-1]:.1%} at most"
    )


if __name__ == "__main__":
    main()
