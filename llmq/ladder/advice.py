"""Which rung to take for a bound on the loss, tried from large to small and from cheap to dear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmq.ladder.bench import Point
from llmq.ladder.rungs import METHODS, SPECS, Rung

# The least share of what rounding adds to the logarithm of perplexity that a method may leave.
# Measured on SmolLM2-135M are an 8th and a 7th for GPTQ at 4 and 3 bits, a 14th for block-wise
# tuning at 3, and half of these where rounding leaves nothing, at 2; other models leave more. A
# dearer method is tried where its share would be within the bound.
LEAST_SHARES = {"rtn": 1.0, "gptq": 1 / 12, "blockwise": 1 / 20}


@dataclass(frozen=True)
class Advice:
    """points: all that were measured. best: the smallest within the bound, None where there is
    none. failed: what came next to it in size, by the method that lost least. left: rungs that were
    not tried, and why."""

    points: list[Point]
    best: Point | None
    failed: Point | None
    left: dict[str, str]


def advise(
    measure: Callable[[Rung], Point],
    bound: float,
    methods: Sequence[str] = METHODS,
    specs: Sequence[str] = SPECS,
    drop: Callable[[Rung], None] = lambda rung: None,
) -> Advice:
    """Go down the sizes until no method is within a bound on the loss, such as .01: the upper end
    of its interval is. measure: of a rung. drop: told what is not, or no longer, the best."""
    points: list[Point] = []
    left: dict[str, str] = {}
    best = failed = None
    for spec in specs:
        tried: list[Point] = []
        for method in methods:
            rung = Rung(spec, method)
            if reason := _hopeless(rung, tried, bound):
                left[str(rung)] = reason
                continue
            tried.append(measure(rung))
            points.append(tried[-1])
            if tried[-1].most <= bound:
                break
            drop(rung)
        passed = [point for point in tried if point.most <= bound]
        if not passed:
            failed = min(tried, key=lambda point: point.loss)
            break
        if best is not None:
            drop(best.rung)
        best = passed[-1]
    return Advice(points, best, failed, left)


def _hopeless(rung: Rung, tried: Sequence[Point], bound: float) -> str | None:
    """Why a dearer method is not worth its time, or None."""
    if not tried or rung.method not in LEAST_SHARES:
        return None
    before = tried[-1]
    reach = LEAST_SHARES.get(before.rung.method, 1.0) / LEAST_SHARES[rung.method]
    added = math.log1p(before.loss)
    if added <= reach * math.log1p(bound):
        return None
    return (
        f"{before.rung} loses {before.loss:.2%}, which adds {added:.3g} to the logarithm of "
        f"perplexity, more than {reach:g} times the bound's {math.log1p(bound):.3g}: "
        f"{rung.method} does not make up for it"
    )
