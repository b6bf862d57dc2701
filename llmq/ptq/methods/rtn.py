"""Round to nearest: no repairs. The first rung of the ladder and the fallback of the others."""

from __future__ import annotations

from torch import Tensor

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.ptq.methods.base import Rounding
from llmq.ptq.solver import SolverResult
from llmq.ptq.stats import LayerStats
from llmq.recipe import Recipe


def rtn(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> SolverResult:
    """Quantize a float32 weight `[N, K]` with scales from its ranges, or from a search under the
    importance `[K]` of its columns (see `rounding.choose_scale`)."""
    n_dead = 0 if importance is None else int((importance == 0).sum())
    return SolverResult(QuantizedTensor.quantize(weight, spec, importance), n_dead=n_dead)


class RTN(Rounding):
    """Plain rounding of every layer."""

    def solve(
        self, weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
    ) -> SolverResult:
        return rtn(weight, spec)


METHOD = RTN()
