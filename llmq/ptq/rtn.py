"""Round to nearest: no data, no repairs. The first rung of the ladder and the fallback of the others."""

from __future__ import annotations

from torch import Tensor

from llmq.ptq.solver import SolverResult
from llmq.qtensor import QuantizedTensor
from llmq.spec import QuantSpec


def rtn(weight: Tensor, spec: QuantSpec) -> SolverResult:
    """Quantize a float32 weight `[N, K]` with scales from its ranges."""
    return SolverResult(QuantizedTensor.quantize(weight, spec))
