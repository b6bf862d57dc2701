"""Values on the command line: argparse types that refuse in one line what no command can use.
Nothing heavy is imported, because `--help` goes through here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

LARGEST = 2**63 - 1  # torch's generators and sizes take no more


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                "expected a whole number, "
                f"{f'at least {low}' if value < low else f'at most {high}'}, got {text!r}"
            )
        return value

    return read


def real(low: float = 0.0) -> Callable[[str], float]:
    """A finite number, at least `low`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(
                f"expected a finite number, at least {low:g}, got {text!r}"
            )
        return value

    return read


def source(text: str) -> str:
    """Where text comes from: any string but an empty one, which would mean the working
    directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "expected a text file, .jsonl, .parquet, folder, Hub data set (name:config:split) or "
            "'bundled', got ''"
        )
    return text
