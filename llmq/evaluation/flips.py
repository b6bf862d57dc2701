"""Answers that change from one model to another. Accuracies hide them: where as many get worse as
better the accuracy stays, and the model is another one (Dutta et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def mcnemar(n_worse: int, n_better: int) -> float:
    """Two-sided p value of McNemar's exact test: how likely flips as uneven as these are where each
    goes either way with probability one half; 1 without any. Ties of two models do not count."""
    n = n_worse + n_better
    tail = sum(math.comb(n, k) for k in range(min(n_worse, n_better) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare_answers(
    base: Sequence[int], quant: Sequence[int], right: Sequence[int]
) -> dict[str, Any]:
    """Accuracy of two models, which questions one got right and the other wrong, by their number,
    those that both got wrong otherwise, and the p value of `mcnemar`. All of one length."""
    flips = [
        {"row": number, "right": wanted, "base": before, "quant": after}
        for number, (before, after, wanted) in enumerate(zip(base, quant, right, strict=True))
        if before != after
    ]
    worse = [flip for flip in flips if flip["base"] == flip["right"]]
    better = [flip for flip in flips if flip["quant"] == flip["right"]]
    return {
        "base_accuracy": _accuracy(base, right),
        "quant_accuracy": _accuracy(quant, right),
        "right_to_wrong": worse,
        "wrong_to_right": better,
        "wrong_to_wrong": [flip for flip in flips if flip not in worse and flip not in better],
        "mcnemar_p": mcnemar(len(worse), len(better)),
    }


def _accuracy(answers: Sequence[int], right: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)
