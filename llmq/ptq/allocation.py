"""One of several specs for each layer, so that what they cost together is least within a budget of
bytes: a knapsack with a choice per item, solved by dynamic programming.

Bytes are counted in a unit. It is the greatest common divisor of what candidates take beyond the
smallest of their item, which makes the choice exact. Where that would be more than `MAX_UNITS`
units for the largest choice of all, it is the smallest multiple that is not, and bytes are rounded
up: the budget is never exceeded, and no choice within the budget less a unit per item costs less.
The unit does not depend on the budget, so a larger budget never costs more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmq.errors import LlmqError

MAX_UNITS = 1 << 17  # a byte each per item are kept: 40 MB for 300 items


@dataclass(frozen=True)
class Item:
    """A layer, or layers that are quantized alike, with its candidates in any order. costs: what
    each costs, finite. n_bytes: what each takes."""

    costs: tuple[float, ...]
    n_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert 0 < len(self.costs) == len(self.n_bytes) < 256, "candidates and their sizes"
        assert all(map(math.isfinite, self.costs)), "costs are finite"

    @property
    def extra_bytes(self) -> list[int]:
        """Of each candidate, beyond the smallest."""
        return [n - min(self.n_bytes) for n in self.n_bytes]


def least_bytes(items: Sequence[Item]) -> int:
    """What the smallest choice takes."""
    return sum(min(item.n_bytes) for item in items)


def allocate(items: Sequence[Item], budget: int) -> list[int]:
    """The number of the candidate that each item gets; of equal costs, the one with fewer bytes.
    budget: bytes of all together. Raises `LlmqError` for one that no choice is within."""
    if (least := least_bytes(items)) > budget:
        raise LlmqError(
            f"a budget of {budget} bytes: the smallest choice for every layer takes {least} bytes"
        )
    unit = _unit(items)
    extra = [[-(-n // unit) for n in item.extra_bytes] for item in items]
    most = sum(max(units) for units in extra)
    n_units = min((budget - least) // unit, most)
    best = np.zeros(n_units + 1)  # the least cost of the items so far, by units that they may take
    choices = np.zeros((len(items), n_units + 1), dtype=np.uint8)
    for item, units, choice in zip(items, extra, choices, strict=True):
        best = _with_item(item, units, best, choice)
    return _chosen(extra, choices)


def _unit(items: Sequence[Item]) -> int:
    """In bytes; see the module's text."""
    divisor = math.gcd(*(n for item in items for n in item.extra_bytes)) or 1
    most = sum(max(item.extra_bytes) for item in items)
    return divisor * -(-most // (divisor * MAX_UNITS)) or 1


def _with_item(item: Item, units: list[int], before: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """The least costs with one item more. choice: gets the candidate that makes them."""
    best = np.full_like(before, np.inf)
    for number in sorted(range(len(units)), key=lambda number: units[number]):
        taken = units[number]
        if taken >= len(before):
            break
        costs = before[: len(before) - taken] + item.costs[number]
        is_better = costs < best[taken:]
        best[taken:][is_better] = costs[is_better]
        choice[taken:][is_better] = number
    return best


def _chosen(extra: list[list[int]], choices: np.ndarray) -> list[int]:
    """Back from the whole budget, which the last item has the rest of."""
    left, chosen = choices.shape[1] - 1, []
    for units, choice in zip(reversed(extra), reversed(choices), strict=True):
        number = int(choice[left])
        chosen.append(number)
        left -= units[number]
    return chosen[::-1]
