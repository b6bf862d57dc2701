"""Layers that share an input, solved in one call: which go together, how the result comes apart,
and what is reported of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import linear_shape
from llmq.ptq.methods.rtn import rtn
from llmq.ptq.solver import RowErrors, SolverResult, row_blocks
from llmq.ptq.stats import LayerStats, output_error
from llmq.ptq.threads import total


@dataclass(frozen=True)
class LayerReport:
    """error, rtn_error: squared output error over squared output, measured on the calibration
    inputs, of the result and of plain rounding; None without calibration data. target: what both
    are the distance from: "weights", the outputs of the full-precision weights on the same inputs,
    or "corrected", these corrected for what the layers before lost, which is what the layer was
    solved for. weight_error: squared error of the weights over their squares, where there is no
    calibration data. exact_error: squared distance from the layer's outputs in the full-precision
    model over the squared length of these, where they are known (layers that narrow, solved with
    both streams). kept_rounding: plain rounding is what is stored, because it came out nearer to
    the target."""

    name: str
    spec: str
    shape: tuple[int, int]
    error: float | None = None
    rtn_error: float | None = None
    damping: float = 0.0
    fallback: str | None = None
    target: str | None = None
    weight_error: float | None = None
    exact_error: float | None = None
    kept_rounding: bool = False
    n_dead_columns: int = 0
    n_dropped_rows: int = 0


def by_spec(
    group: Sequence[str], targets: dict[str, QuantSpec]
) -> Iterator[tuple[list[str], QuantSpec]]:
    """Parts of a group that can be solved in one call: equal specs, and never several tensors under
    one scale."""
    by_spec: dict[QuantSpec, list[str]] = {}
    for layer in group:
        by_spec.setdefault(targets[layer], []).append(layer)
    for spec, layers in by_spec.items():
        if spec.group_size == PER_TENSOR:
            yield from (([layer], spec) for layer in layers)
        else:
            yield layers, spec


def split(result: SolverResult, rows: list[int]) -> list[SolverResult]:
    """The parts of a solve over stacked layers with so many rows each."""
    if len(rows) == 1:
        return [result]
    stops = torch.tensor(rows).cumsum(0).tolist()
    return [
        replace(
            result,
            tensor=result.tensor.rows(stop - n, stop),
            errors=None if result.errors is None else result.errors.rows(stop - n, stop),
        )
        for stop, n in zip(stops, rows, strict=True)
    ]


def better_of(result: SolverResult, weight: Tensor) -> SolverResult:
    """The result, or plain rounding of the full-precision weight `[N, K]` where that comes nearer
    to what the solver aimed at."""
    errors = result.errors
    if errors is None or total(errors.result) <= total(errors.rounding):
        return result
    rounded = rtn(weight, result.tensor.spec).tensor
    return replace(
        result, tensor=rounded, errors=RowErrors(errors.rounding, errors.rounding), is_rounding=True
    )


def n_rows(block: nn.Module, layer: str) -> int:
    """Outputs of a layer."""
    shape = linear_shape(block.get_submodule(layer))
    assert shape is not None
    return shape[0]


def report_layer(
    name: str, original: Tensor, result: SolverResult, stats: LayerStats | None
) -> LayerReport:
    """What became of the weight `original` `[N, K]`, measured on the layer's own inputs where there
    are statistics."""
    known: dict[str, Any] = {}
    if stats is None:
        difference = result.tensor.dequantize().sub_(original)
        known["weight_error"] = _ratio(_squares(difference), _squares(original))
    else:
        energy = output_error(original, stats.hessian)
        error, rounding = _errors(original, result, stats)
        is_corrected = stats.cross is not None and result.errors is not None
        known = {
            "error": _ratio(error, energy),
            "rtn_error": _ratio(rounding, energy),
            "target": "corrected" if is_corrected else "weights",
            "exact_error": stats.exact_error(original, result.tensor.dequantize()),
        }
    return LayerReport(
        name,
        str(result.tensor.spec),
        result.tensor.shape,
        damping=result.damping,
        fallback=result.fallback,
        kept_rounding=result.is_rounding,
        n_dead_columns=result.n_dead,
        n_dropped_rows=0 if stats is None else stats.n_dropped,
        **known,
    )


def _ratio(error: float, energy: float) -> float:
    return error / max(energy, 1e-30)


def _squares(values: Tensor) -> float:
    return total(values.square())


def _errors(original: Tensor, result: SolverResult, stats: LayerStats) -> tuple[float, float]:
    """Squared output errors of a result and of plain rounding: as the solver measured them, or from
    the weight's own outputs."""
    if result.errors is not None:
        return total(result.errors.result), total(result.errors.rounding)
    parts = [
        _row_errors(original, result.tensor, stats.hessian, rows)
        for rows in row_blocks(original, result.tensor.spec)
    ]
    error, rounding = (sum(values) for values in zip(*parts, strict=True))
    return error, rounding


def _row_errors(
    original: Tensor, tensor: QuantizedTensor, hessian: Tensor, rows: slice
) -> tuple[float, float]:
    """Squared output error of some rows after this quantization and after plain rounding."""
    part, spec = original[rows], tensor.spec
    quantized = tensor if len(part) == len(original) else tensor.rows(rows.start, rows.stop)
    return (
        output_error(quantized.dequantize().sub_(part), hessian),
        output_error(QuantizedTensor.quantize(part, spec).dequantize().sub_(part), hessian),
    )
