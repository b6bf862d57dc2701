"""Layers that share an input, solved in one call: which go together, how the result comes apart,
and what is reported of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.models.arch import linear_shape
from llmq.ptq.gptq import GPTQOptions, gptq, row_blocks
from llmq.ptq.rtn import rtn
from llmq.ptq.solver import SolverResult
from llmq.ptq.stats import LayerStats, output_error
from llmq.qtensor import QuantizedTensor
from llmq.recipe import Recipe
from llmq.spec import PER_TENSOR, QuantSpec


@dataclass(frozen=True)
class LayerReport:
    """error, rtn_error: squared output error over squared output, measured on the calibration
    inputs, of the result and of plain rounding; None without calibration data."""

    name: str
    spec: str
    shape: tuple[int, int]
    n_bytes: int
    bits_per_weight: float
    error: float | None = None
    rtn_error: float | None = None
    damping: float = 0.0
    fallback: str | None = None
    n_dead_columns: int = 0
    n_dropped_rows: int = 0


def by_spec(
    group: list[str], targets: dict[str, QuantSpec]
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


def solve(
    weight: Tensor, stats: LayerStats | None, spec: QuantSpec, recipe: Recipe
) -> SolverResult:
    """Quantize a float32 weight `[N, K]` by the recipe's layer solver, which block-wise tuning
    starts from; without statistics by plain rounding."""
    if recipe.method == "rtn" or stats is None:
        return rtn(weight, spec)
    if recipe.init == "rtn":
        return rtn(weight, spec, stats.hessian.diagonal() if recipe.search else None)
    return gptq(
        weight,
        stats,
        spec,
        GPTQOptions(recipe.order, recipe.damping, recipe.search, recipe.sweeps, recipe.alpha),
    )


def split(result: SolverResult, rows: list[int]) -> list[SolverResult]:
    """The parts of a solve over stacked layers with so many rows each."""
    if len(rows) == 1:
        return [result]
    stops = torch.tensor(rows).cumsum(0).tolist()
    return [
        SolverResult(
            result.tensor.rows(stop - n, stop), result.damping, result.n_dead, result.fallback
        )
        for stop, n in zip(stops, rows, strict=True)
    ]


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
    n, k = result.tensor.shape
    errors: dict[str, float] = {}
    if stats is not None:
        parts = [
            _row_errors(original, result.tensor, stats.hessian, rows)
            for rows in row_blocks(original, result.tensor.spec)
        ]
        energy, error, rtn_error = (sum(values) for values in zip(*parts, strict=True))
        errors = {"error": error / max(energy, 1e-30), "rtn_error": rtn_error / max(energy, 1e-30)}
    return LayerReport(
        name, str(result.tensor.spec), (n, k), result.tensor.n_bytes, 8 * result.tensor.n_bytes / (n * k), damping=result.damping, fallback=result.fallback,
        n_dead_columns=result.n_dead, n_dropped_rows=0 if stats is None else stats.n_dropped, **errors,
    )  # fmt: skip


def _row_errors(
    original: Tensor, tensor: QuantizedTensor, hessian: Tensor, rows: slice
) -> tuple[float, float, float]:
    """Squared output of some rows, and its squared error after this quantization and after plain
    rounding."""
    part, spec = original[rows], tensor.spec
    quantized = tensor if len(part) == len(original) else tensor.rows(rows.start, rows.stop)
    error = output_error(quantized.dequantize().sub_(part), hessian)
    return (
        output_error(part, hessian),
        error,
        output_error(QuantizedTensor.quantize(part, spec).dequantize().sub_(part), hessian),
    )
