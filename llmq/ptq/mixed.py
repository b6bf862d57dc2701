"""Bits where they count: a spec for every layer, so that the model loses least within a budget.

Layers whose rule is about all of them (`*`) take part, those with a rule of their own stay as it
says and count. Members of a group that engines fuse get one spec. What candidates cost is the
estimate of `sensitivity`, taken as if layers did not touch each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from llmq.arguments import check_type
from llmq.errors import LlmqError
from llmq.grid.spec import PER_TENSOR, QuantSpec
from llmq.models.experts import unfused_in
from llmq.models.site import fused_names
from llmq.ptq.allocation import Item, allocate, least_bytes
from llmq.ptq.job import Job
from llmq.ptq.parts import parts
from llmq.ptq.sensitivity import Cost
from llmq.recipe import LayerPlan, Recipe, Rule
from llmq_kernels.core.packing import packed_width

BITS = (2, 3, 4, 5, 6, 8)
WITH_ZERO_POINTS = (2, 3)  # where they are worth their bytes, also when nobody asks for them
ABOUT_EQUAL = 0.9  # of the budget: a uniform result that is smaller says little
HEADER_BYTES = 160  # in the header of a weight file, per tensor, with a name of usual length

Costs = Mapping[str, Mapping[str, Cost]]
"""What candidates cost a layer, by its name and the text of the candidate."""


@dataclass(frozen=True)
class Budget:
    """One of two. bits: per weight of all layers that are quantized, scales and zero points
    included. n_bytes: of the weight files."""

    bits: float | None = None
    n_bytes: int | None = None

    @classmethod
    def of(cls, bits: float | None, n_bytes: int | None) -> Budget:
        """Raises `LlmqError` for numbers that make no budget."""
        given = [number for number in (bits, n_bytes) if number is not None]
        if len(given) != 1:
            raise LlmqError("bpw and max_bytes: each says how many bits there are; give one")
        check_type("bpw" if bits is not None else "max_bytes", given[0], (int, float), "a number")
        if not 0 < given[0] < math.inf:
            raise LlmqError(f"a budget of {given[0]}: expected a finite number above 0")
        return cls(bits, n_bytes)

    def __str__(self) -> str:
        return f"--bpw {self.bits:g}" if self.bits is not None else f"--max-bytes {self.n_bytes}"


@dataclass(frozen=True)
class Choice:
    """specs: by name of layer, of those that take part. n_bytes, n_weights: of all layers that are
    quantized. cost: what they are estimated to lose together, in nats per token."""

    specs: dict[str, QuantSpec]
    n_bytes: int
    n_weights: int
    cost: float

    @property
    def bits(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    def recipe(self, base: Recipe) -> Recipe:
        """The base with a rule for each layer; it can be run again without measuring."""
        rules = tuple(Rule(name, spec) for name, spec in self.specs.items())
        return replace(base, rules=(*rules, *base.rules))

    def to_json(self) -> dict[str, Any]:
        n_layers: dict[str, int] = {}
        for spec in self.specs.values():
            n_layers[str(spec)] = n_layers.get(str(spec), 0) + 1
        return {
            "bits_per_quantized_weight": round(self.bits, 4),
            "estimated_kl": self.cost,
            "layers_by_spec": n_layers,
        }


def stored_size(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Bytes of a quantized tensor, as reports count them (`QuantizedTensor.n_bytes`)."""
    n, k = shape
    n_scales = 1 if spec.group_size == PER_TENSOR else n * spec.n_groups(k)
    scale_bytes = 4 if spec.scale_dtype == "float32" else 2
    zero_bytes = 0 if spec.symmetric else 1
    return 4 * n * packed_width(k, spec.bits) + n_scales * (scale_bytes + zero_bytes)


def candidates_of(plan: LayerPlan, job: Job) -> list[QuantSpec]:
    """Specs of other widths with the group size that is planned, those that the format holds."""
    spec = plan.spec
    assert spec is not None
    found = []
    for bits in BITS:
        ways = [spec.symmetric] if bits not in WITH_ZERO_POINTS else [True, False]
        for is_symmetric in ways:
            candidate = replace(spec, code=f"int{bits}", symmetric=is_symmetric)
            if job.fmt.refusal_of(plan.role, candidate, plan.layer.shape) is None:
                found.append(candidate)
    return found


@dataclass(frozen=True)
class Problem:
    """What is to be chosen. candidates: by name of layer, of those that take part. fixed_bytes,
    fixed_weights: of the quantized layers that do not."""

    job: Job
    candidates: dict[str, list[QuantSpec]]
    fixed_bytes: int
    fixed_weights: int

    @classmethod
    def of(cls, job: Job) -> Problem:
        """Raises `LlmqError` where nothing can be chosen."""
        _refuse_experts(job)
        candidates, fixed, weights = {}, 0, 0
        for plan in job.plans:
            if plan.spec is None:
                continue
            if job.recipe.takes_part(plan):
                candidates[plan.layer.name] = candidates_of(plan, job)
            else:
                fixed += stored_size(plan.spec, plan.layer.shape)
                weights += prod(plan.layer.shape)
        for plan in job.outside:
            fixed += stored_size(plan.spec, plan.layer.shape) if plan.spec else 0
            weights += prod(plan.layer.shape)
        some = {plan.layer.name: plan.spec for plan in job.plans}
        for number, (name, specs) in enumerate(candidates.items()):
            some[name] = specs[-(number % 2)] if specs else None
        if (reason := job.fmt.refusal_of_model(some)) is not None:
            raise LlmqError(f"format {job.fmt.name} holds no mixed bits: {reason}; name another")
        if not any(len(specs) > 1 for specs in candidates.values()):
            raise LlmqError(
                f"format {job.fmt.name} holds no two of the widths {', '.join(map(str, BITS))} for "
                "layers without a rule of their own, so there is nothing to choose"
            )
        return cls(job, candidates, fixed, weights)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {plan.layer.name: plan.layer.shape for plan in self.job.plans}

    @cached_property
    def n_weights(self) -> int:
        """Of all layers that are quantized."""
        return self.fixed_weights + sum(prod(self.shapes[name]) for name in self.candidates)

    @cached_property
    def groups(self) -> list[list[str]]:
        """Layers that get one spec: those that engines fuse."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in self.candidates:
            groups.setdefault(fused_names(name), []).append(name)
        return list(groups.values())

    def specs_of(self, group: Sequence[str]) -> list[QuantSpec]:
        """The candidates that all members have."""
        others = [self.candidates[name] for name in group[1:]]
        return [s for s in self.candidates[group[0]] if all(s in specs for specs in others)]

    def layer_bytes(self, budget: Budget) -> int:
        """What all quantized layers may take."""
        if budget.bits is not None:
            return int(budget.bits * self.n_weights / 8)
        assert budget.n_bytes is not None
        job = self.job
        planned = [plan for plan in job.all_plans if plan.spec is not None]
        quantized = sum(
            prod(plan.layer.shape) * plan.spec.bits_per_weight(*plan.layer.shape) / 8
            for plan in planned
            if plan.spec is not None
        )
        others = sum(part.planned_bytes for part in parts(job)) - quantized
        n_tensors = sum(1 for _ in job.model.named_parameters()) + 3 * len(planned)
        return int(budget.n_bytes - others - HEADER_BYTES * n_tensors)

    def choose(self, costs: Costs, budget: Budget) -> Choice:
        """The least estimated loss within a budget. Raises `LlmqError` for one that is too
        small."""
        items = [self._item(group, costs) for group in self.groups]
        allowed = self.layer_bytes(budget) - self.fixed_bytes
        if (least := least_bytes(items)) > allowed:
            raise self._too_small(budget, least - allowed, least)
        chosen = allocate(items, allowed)
        pairs = zip(self.groups, chosen, strict=True)
        return self.choice({name: self.specs_of(g)[i] for g, i in pairs for name in g}, costs)

    def choice(self, specs: dict[str, QuantSpec], costs: Costs) -> Choice:
        """A choice among the candidates that is given."""
        in_order = {name: fitted(specs[name], costs[name]) for name in self.candidates}
        n_bytes = sum(stored_size(spec, self.shapes[name]) for name, spec in in_order.items())
        cost = sum(costs[name][str(spec)].nats for name, spec in in_order.items())
        return Choice(in_order, self.fixed_bytes + n_bytes, self.n_weights, cost)

    def uniform(self, costs: Costs, budget: Budget) -> Choice | None:
        """The best choice of one width for all layers, with as many bytes as the budget has or
        some less; None where there is none that near."""
        allowed = self.layer_bytes(budget)
        found = []
        kinds = {(s.bits, s.symmetric) for specs in self.candidates.values() for s in specs}
        for kind in sorted(kinds):
            specs = {
                name: spec
                for name, all_specs in self.candidates.items()
                for spec in all_specs
                if (spec.bits, spec.symmetric) == kind
            }
            if specs.keys() == self.candidates.keys():
                found.append(self.choice(specs, costs))
        near = [each for each in found if ABOUT_EQUAL * allowed <= each.n_bytes <= allowed]
        return min(near, key=lambda choice: choice.cost, default=None)

    def _item(self, group: Sequence[str], costs: Costs) -> Item:
        specs = self.specs_of(group)
        return Item(
            tuple(sum(costs[name][str(spec)].nats for name in group) for spec in specs),
            tuple(sum(self._size(name, spec, costs) for name in group) for spec in specs),
        )

    def _size(self, name: str, spec: QuantSpec, costs: Costs) -> int:
        return stored_size(fitted(spec, costs[name]), self.shapes[name])

    def _too_small(self, budget: Budget, missing: int, least: int) -> LlmqError:
        if budget.n_bytes is not None:
            return LlmqError(
                f"{budget}: the smallest choice takes {missing} bytes more; give --max-bytes "
                f"{budget.n_bytes + missing} or more, or --embeddings w8, if they are not quantized"
            )
        bits = 8 * (least + self.fixed_bytes) / self.n_weights
        return LlmqError(f"{budget}: the smallest choice for every layer takes {bits:.4f} bits")


def fitted(spec: QuantSpec, costs: Mapping[str, Cost]) -> QuantSpec:
    """A candidate with the scale dtype that holds the scales of a layer. costs: of the layer."""
    return replace(spec, scale_dtype=costs[str(spec)].scale_dtype)  # type: ignore[arg-type]


def _refuse_experts(job: Job) -> None:
    """Raise `LlmqError` for layers of experts whose bits would have to be chosen."""
    for module in unfused_in(job.model):
        inside = [plan for plan in job.plans if plan.layer.name.startswith(f"{module}.")]
        if any(job.recipe.takes_part(plan) for plan in inside):
            raise LlmqError(
                f"{module}: what bits are worth is not measured in experts, each of which sees "
                f"other tokens; give them a spec: --rule '*.{module.rpartition('.')[2]}.*=w4g128'"
            )
