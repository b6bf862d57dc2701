"""Embeddings and output head: what becomes of them, and rounding them.

They lie outside of the blocks and stay as they are stored unless a recipe says otherwise. No text
is needed: embeddings have no inputs that could be measured, so each group of a row gets the scale
whose rounding error is least, and every row is rounded by itself. Where both are one tensor it is
quantized once, and stored once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.grid.tensor import QuantizedTensor, quantize_by_rows, some_rows
from llmq.models.outside import HEAD, TIED, Table, tables_of
from llmq.models.readers import WeightReader
from llmq.ptq.blocks import Blocks
from llmq.ptq.scales import DTYPES, lost_energy, most_lost, with_scale_dtype
from llmq.recipe import Layer, LayerPlan, Recipe


def plan_outside(model: PreTrainedModel, recipe: Recipe) -> list[LayerPlan]:
    """What becomes of embeddings and head, those that are kept left out. Raises `LlmqError` for a
    model that cannot have them quantized and for one tensor that is to become two things."""
    if recipe.embeddings is None and recipe.head is None:
        return []
    tables = tables_of(model)
    return [plan for table in tables if (plan := _plan(table, _asked(table, recipe))) is not None]


def _asked(table: Table, recipe: Recipe) -> QuantSpec | None:
    if table.role != TIED:
        return recipe.head if table.role == HEAD else recipe.embeddings
    both = {spec for spec in (recipe.embeddings, recipe.head) if spec is not None}
    if len(both) > 1:
        raise LlmqError(
            f"--embeddings {recipe.embeddings} and --head {recipe.head}: in this model they are "
            f"one tensor ({table.name}, tie_word_embeddings), which is quantized and stored once; "
            "give one of the two options"
        )
    return both.pop()


def _plan(table: Table, asked: QuantSpec | None) -> LayerPlan | None:
    if asked is None:
        return None
    layer = Layer(table.name, table.shape)
    if asked.group_size == PER_TENSOR:
        raise LlmqError(
            f"{table.role} {asked}: rows are rounded one by one, so one scale for the whole is not "
            "possible; use one per row (w8) or group (w4g64)"
        )
    fitting = asked.fit(table.shape[1])
    if fitting is None:
        raise LlmqError(
            f"{table.role} {asked}: no group size of 128, 64 or 32 at or below {asked.group_size} "
            f"divides the {table.shape[1]} columns of {table.name}; use one scale per row (w8)"
        )
    note = ""
    if fitting != asked:
        note = (
            f"group size {fitting.group_size} instead of {asked.group_size}, which does not divide "
            f"K = {table.shape[1]}"
        )
    return LayerPlan(layer, fitting, note, role=table.role)


def fitting_outside(
    plans: Sequence[LayerPlan], weight_of: Callable[[str], Tensor]
) -> list[LayerPlan]:
    """The plans with scale dtypes that hold the scales, as `fitting_plans` has it for layers."""
    fitting = []
    for plan in plans:
        assert plan.spec is not None
        spec = fitting_table_spec(weight_of(plan.layer.name), plan.spec)
        fitting.append(with_scale_dtype(plan, spec))
    return fitting


def fitting_table_spec(weight: Tensor, spec: QuantSpec) -> QuantSpec:
    """The spec with the first scale dtype that holds the scales of a table `[vocabulary, D]`."""
    for name in DTYPES[DTYPES.index(spec.scale_dtype) :]:
        spec = replace(spec, scale_dtype=name)  # type: ignore[arg-type]
        parts = [lost_energy(rows.float(), spec) for rows in some_rows(weight)]
        if sum(lost for lost, _ in parts) <= most_lost(spec) * sum(whole for _, whole in parts):
            break
    return spec


def quantize_table(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Round a table `[vocabulary, D]` by the scales of least error."""
    importance = torch.ones(weight.shape[1], device=weight.device)
    return quantize_by_rows(weight, spec, importance)


def report_table(plan: LayerPlan, weight: Tensor, qtensor: QuantizedTensor) -> dict[str, Any]:
    """What became of a table. weight_error: squared error of the weights over their squares."""
    error = whole = 0.0
    start = 0
    for rows in some_rows(weight):
        stop = start + len(rows)
        values = rows.float()
        error += float((qtensor.rows(start, stop).dequantize() - values).double().square().sum())
        whole += float(values.double().square().sum())
        start = stop
    return {
        "name": plan.layer.name,
        "role": plan.role,
        "spec": str(plan.spec),
        "shape": list(qtensor.shape),
        "weight_error": error / max(whole, 1e-30),
    }


class OutsideReader:
    """Weights of a model with the tables in it as they are stored: dequantized. tables: by the name
    of the module."""

    def __init__(
        self, reader: WeightReader, tables: Callable[[], Mapping[str, QuantizedTensor]]
    ) -> None:
        self.reader, self.tables = reader, tables

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        found = {f"{name}.weight": table for name, table in self.tables().items()}
        read = self.reader.read_parameters([name for name in names if name not in found])
        return read | {name: _dequantized(found[name]) for name in names if name in found}


def _dequantized(table: QuantizedTensor) -> Tensor:
    """float32 `[N, K]`, some rows at a time: what they need meanwhile is more than they are."""
    values = torch.empty(table.shape, device=table.scale.device)
    start = 0
    for rows in some_rows(values):
        rows.copy_(table.rows(start, start + len(rows)).dequantize())
        start += len(rows)
    return values


def as_stored(blocks: Blocks, outside: WeightReader | None) -> Blocks:
    """The blocks among what will lie outside of them. outside: gives that; None where it is what
    the source has."""
    if outside is None:
        return blocks
    return Blocks(copy.deepcopy(blocks.model), outside, blocks.device)
