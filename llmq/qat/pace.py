"""How fast masters go, in steps of their grid, and how far from the edge of their cells they start.

An optimizer like Adam moves every weight by about its learning rate, whatever the gradient's size,
and the first updates of all are mostly noise. A master that starts nearer to the edge of its cell
than these take it changes its code for no reason, and a start whose codes balance each other, as
GPTQ's do, is lost at once. The README of this folder has what was measured."""

from __future__ import annotations

from math import sqrt

from llmq.grid.spec import QuantSpec

LONG_RUN = 1200  # updates, from which on masters go at the rate of their grid
HASTE = 4.0  # what the shortest runs take of it
NOISE = 25.0  # updates that may all go one way before a direction is known
WIDEST = 0.3  # steps; at half a step all masters would start in the middle of their cells


def grid_rate(spec: QuantSpec, n_steps: int | None = None) -> float:
    """Peak learning rate of masters in steps of their grid. n_steps: updates of the run, of which a
    short one goes faster; None: unknown, and many.

    Those of 4 and 2 bits and ternary are measured, and half-integer levels stand beside them. Above
    4 bits a step is so small that it is the weight itself that may not move too far, in a short run
    neither: masters move by the same share of it whatever the number of levels."""
    of_4_bits = 2e-3
    if spec.bits > 4:
        return of_4_bits * (2**spec.bits - 1) / 15
    rates = {"int3": 1.5e-3, "int2": 4e-3, "int2h": 4e-3, "ternary": 2e-3}
    # Noise takes a master as far as the root of the number of updates.
    haste = 1.0 if n_steps is None else min(HASTE, max(1.0, sqrt(LONG_RUN / n_steps)))
    return haste * rates.get(spec.code, of_4_bits)


def margin(rate: float) -> float:
    """How many steps of their grid masters start from the edge of their cells, for a peak rate in
    steps."""
    return min(WIDEST, NOISE * rate)


def reaches_edge(spec: QuantSpec, n_steps: int) -> bool:
    """Whether a run is long enough for masters to leave the cells that they start in, at a rate
    that falls along half a cosine. In a shorter one scales, norms and embeddings learn alone."""
    rate = grid_rate(spec, n_steps)
    return 0.5 * n_steps * rate > margin(rate)
