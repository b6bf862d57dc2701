"""Intervals by bootstrap over windows.

Neighbouring tokens are not independent, windows nearly are: so windows are drawn with replacement,
never single tokens. The windows of one text are the blocks of a block bootstrap."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

N_RESAMPLES = 2000


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of one value per window, float64 `[n]`. With one window it is that
    value twice: nothing is known of the spread."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.stack(
        [values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(N_RESAMPLES)]
    )
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def ratio_interval(sums: Tensor, sizes: Tensor, seed: int = 0) -> tuple[float, float]:
    """95% interval of `sums.sum() / sizes.sum()`, `[n]` each: of a mean over parts of a text that
    are not of one size, drawn as wholes."""
    n = len(sums)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(n, (n,), generator=generator) for _ in range(N_RESAMPLES)]
    draws = torch.stack([sums[each].sum() / sizes[each].sum() for each in drawn])
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return low, high


def reported_interval(interval: Iterable[float], n_windows: int) -> list[float] | None:
    """An interval as it is reported: None with one window, because one of no width would look like
    certainty."""
    return list(interval) if n_windows > 1 else None
