"""What every layer solver gives back."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.qtensor import QuantizedTensor


@dataclass(frozen=True)
class SolverResult:
    """tensor: the quantized weight. damping: the share of the mean diagonal that the Hessian
    needed. n_dead: columns whose input was always zero. fallback: None, or why plain rounding was
    used instead."""

    tensor: QuantizedTensor
    damping: float = 0.0
    n_dead: int = 0
    fallback: str | None = None
