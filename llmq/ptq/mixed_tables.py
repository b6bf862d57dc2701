"""Embeddings and head in a choice of bits.

They take part where the budget is of bytes, each as it is stored or in 8 bits or fewer, as far as
the format holds them quantized. A budget of bits per weight counts what is quantized, and says
nothing of whether they should be: there they stay as a recipe has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from llmq.errors import LlmqError
from llmq.grid.spec import PER_ROW, QuantSpec
from llmq.models.outside import HEAD, Table, tables_of
from llmq.ptq.job import Job
from llmq.ptq.parts import element_bytes
from llmq.ptq.scales import with_scale_dtype
from llmq.recipe import Layer, LayerPlan, Recipe

BITS = (3, 4, 5, 6)  # in groups, as layers; 8 bits have a scale per row


def table_candidates(job: Job, group_size: int) -> dict[Table, list[QuantSpec]]:
    """What embeddings and head may become beside what they are, those left out that a recipe
    decides and those that the format does not hold. group_size: at most."""
    decided = {plan.layer.name for plan in job.outside}
    try:
        tables = [table for table in tables_of(job.model) if table.name not in decided]
    except LlmqError:  # no plain matrices, which nobody has asked for
        return {}
    found = {table: _held(table, group_size, job) for table in tables}
    return {table: specs for table, specs in found.items() if specs}


def _held(table: Table, group_size: int, job: Job) -> list[QuantSpec]:
    asked = [QuantSpec(f"int{bits}", group_size) for bits in BITS]
    fitting = [spec.fit(table.shape[1]) for spec in asked] + [QuantSpec("int8", PER_ROW)]
    return [
        spec
        for spec in fitting
        if spec is not None and job.fmt.refusal_of(table.role, spec, table.shape) is None
    ]


def kept_bytes(table: Table, job: Job) -> int:
    """What it takes as it is."""
    return int(prod(table.shape) * element_bytes(job))


def with_tables(recipe: Recipe, tables: Mapping[Table, QuantSpec]) -> Recipe:
    """The recipe that says so."""
    for table, spec in tables.items():
        is_head = table.role == HEAD
        recipe = replace(recipe, head=spec) if is_head else replace(recipe, embeddings=spec)
    return recipe


def table_plans(tables: Mapping[Table, QuantSpec]) -> list[LayerPlan]:
    """As `plan_outside` and `fitting_outside` make them."""
    plans = []
    for table, spec in tables.items():
        asked = replace(spec, scale_dtype=QuantSpec.scale_dtype)
        plan = LayerPlan(Layer(table.name, table.shape), asked, role=table.role)
        plans.append(with_scale_dtype(plan, spec))
    return plans
