"""Comparing the speed of functions on a machine that is not always equally fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def medians(
    candidates: Mapping[str, Sequence[Callable[[], object]]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate, `repeats` calls each.

    Candidates take turns call by call, so that a slower second of the machine hits all of them and
    ratios of the medians hold. A candidate is a list of copies that take turns, so that its weights
    come from memory and not from a small cache. For functions that return when they are done: a GPU
    needs events instead.

    clock: `time.thread_time` counts the processor time of this thread alone, which is what to
    compare for functions of one thread on a machine that others use, too."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + warmup):
        for name, copies in candidates.items():
            function = copies[repeat % len(copies)]
            started = clock()
            function()
            if repeat >= warmup:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
