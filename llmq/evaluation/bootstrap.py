"""Intervals by bootstrap over windows.

Neighbouring tokens are not independent, windows nearly are: so windows are drawn with replacement,
never single tokens. The windows of one text are the blocks of a block bootstrap."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from llmq.errors import LlmqError

N_RESAMPLES = 2000
MOST_NATS = 709.0  # of which e to the power is a float


def perplexity_of(nats: float) -> float:
    """Of a mean negative log-likelihood, or a ratio of a difference. Raises `LlmqError` where that
    is more than a float holds: weights that are damaged can make it so."""
    if nats >= MOST_NATS:
        raise LlmqError(
            f"a mean of {nats:.0f} nats per token, whose perplexity is more than a float holds: "
            "the weights are damaged, or no language model's; llmq verify checks a folder's files"
        )
    return math.exp(nats)


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
