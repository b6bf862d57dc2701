"""Bits where they count: a spec for every layer, so that the model loses least within a budget.

Layers whose rule is about all of them (`*`) take part, those with a rule of their own stay as it
says and count. Members of a group that engines fuse get one spec. What candidates cost is the
estimate of `sensitivity`, taken as if layers did not touch each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod

from llmq.errors import LlmqError
from llmq.grid.spec import PER_ROW, QuantSpec
from llmq.models.experts import UnfusedExperts, token_shares, unfused_in
from llmq.models.outside import Table
from llmq.models.site import fused_names
from llmq.ptq.allocation import Item, allocate, least_bytes
from llmq.ptq.choice import Budget, Choice
from llmq.ptq.costs import Cost
from llmq.ptq.expert_costs import MEASURED, expert_of
from llmq.ptq.job import Job
from llmq.ptq.methods import split_name
from llmq.ptq.mixed_tables import kept_bytes, table_candidates
from llmq.ptq.parts import parts
from llmq.recipe import LayerPlan

BITS = (2, 3, 4, 5, 6, 8)
WITH_ROWS = (3, 4)  # where scales for groups are a tenth of the bits, and not always worth it
WITH_ZERO_POINTS = (2, 3)  # where they are worth their bytes, also when nobody asks for them
ABOUT_EQUAL = 0.9  # of the budget: a uniform result that is smaller says little
HEADER_BYTES = 160  # in the header of a weight file, per tensor, with a name of usual length
_HINT = ", or --format llmq, which holds embeddings and head in few bits"

Costs = Mapping[str, Mapping[str, Cost]]
"""What candidates cost a layer, by its name and the text of the candidate."""


def candidates_of(plan: LayerPlan, job: Job) -> list[QuantSpec]:
    """Specs of other widths with the group size that is planned, and of some with one scale per
    row, those that the format holds."""
    spec = plan.spec
    assert spec is not None
    found = []
    for bits in BITS:
        ways = [spec.symmetric] if bits not in WITH_ZERO_POINTS else [True, False]
        has_rows = bits in WITH_ROWS and spec.group_size > 0 and not job.fmt.one_group_size
        sizes = [spec.group_size, PER_ROW] if has_rows else [spec.group_size]
        for is_symmetric, size in product(ways, sizes):
            candidate = replace(spec, code=f"int{bits}", symmetric=is_symmetric, group_size=size)
            if job.fmt.refusal_of(plan.role, candidate, plan.layer.shape) is None:
                found.append(candidate)
    return found


@dataclass(frozen=True)
class Problem:
    """What is to be chosen. candidates: by name of layer, of those that take part. fixed: what is
    quantized and does not. tables: candidates of embeddings and head that take part, beside
    keeping them."""

    job: Job
    candidates: dict[str, list[QuantSpec]]
    fixed: list[LayerPlan]
    tables: dict[Table, list[QuantSpec]]

    @classmethod
    def of(cls, job: Job, budget: Budget) -> Problem:
        """Raises `LlmqError` where nothing can be chosen."""
        transforms, method = split_name(job.recipe.method)
        if transforms:
            raise LlmqError(
                f"--method {job.recipe.method}: what bits are worth is measured before scale moves "
                f"between layers; use --method {method}"
            )
        taking_part = [plan for plan in job.plans if job.recipe.takes_part(plan)]
        candidates = {plan.layer.name: candidates_of(plan, job) for plan in taking_part}
        fixed = [plan for plan in job.all_plans if plan.spec and plan.layer.name not in candidates]
        tables: dict[Table, list[QuantSpec]] = {}
        if budget.n_bytes is not None:
            sizes = [plan.spec.group_size for plan in taking_part if plan.spec is not None]
            tables = table_candidates(job, max(sizes, default=PER_ROW))
        problem = cls(job, candidates, fixed, tables)
        problem._check()
        return problem

    def _check(self) -> None:
        """Raise `LlmqError` for a format that holds no two widths, of a layer or beside each
        other."""
        fmt, some = self.job.fmt, {plan.layer.name: plan.spec for plan in self.job.plans}
        options = [self.options_of(group) for group in self.groups]
        for number, own in enumerate(options):
            some |= own[-(number % 2)] if own else {}
        if (reason := fmt.refusal_of_model(some)) is not None:
            raise LlmqError(f"format {fmt.name} holds no mixed bits: {reason}; name another")
        if not any(len(own) > 1 for own in options):
            raise LlmqError(
                f"format {fmt.name} holds no two of the widths {', '.join(map(str, BITS))} for "
                "layers without a rule of their own, so there is nothing to choose"
            )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        shapes = {plan.layer.name: plan.layer.shape for plan in self.job.plans}
        return shapes | {table.name: table.shape for table in self.tables}

    @cached_property
    def fixed_bytes(self) -> int:
        return sum(map(self.job.planned_bytes, self.fixed))

    @cached_property
    def n_weights(self) -> int:
        """Of all layers that are quantized, and of tables that a recipe says so of."""
        own = sum(prod(self.shapes[name]) for name in self.candidates)
        return own + sum(prod(plan.layer.shape) for plan in self.fixed)

    @property
    def all_candidates(self) -> dict[str, list[QuantSpec]]:
        """Of layers and tables."""
        return self.candidates | {table.name: specs for table, specs in self.tables.items()}

    @cached_property
    def experts(self) -> dict[str, UnfusedExperts]:
        return unfused_in(self.job.model)

    @cached_property
    def token_shares(self) -> dict[str, float]:
        return token_shares(self.job.model)

    @cached_property
    def groups(self) -> list[list[str]]:
        """Layers that get bits together: those that engines fuse, and all experts of a module."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in self.candidates:
            expert = expert_of(name, self.experts)
            key = fused_names(name) if expert is None else (expert[0],)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def options_of(self, group: Sequence[str]) -> list[dict[str, QuantSpec]]:
        """The candidates that all members have, one for each member."""
        members = [{_kind(s): s for s in self.candidates[name]} for name in group]
        kinds = [kind for kind in members[0] if all(kind in own for own in members)]
        return [
            {name: own[kind] for name, own in zip(group, members, strict=True)} for kind in kinds
        ]

    def measured_shares(self, layer: str) -> tuple[float, float]:
        """How many of all tokens a layer multiplies, and how much of its costs is measured: of
        experts some stand for all."""
        expert = expert_of(layer, self.experts)
        if expert is None:
            return 1.0, 1.0
        share = self.token_shares[expert[0]]
        return share, min(1.0, MEASURED / self.experts[expert[0]].n_experts)

    def allowed_bytes(self, budget: Budget) -> int:
        """What everything that is quantized may take, and tables that take part."""
        if budget.bits is not None:
            return int(budget.bits * self.n_weights / 8)
        assert budget.n_bytes is not None
        job = self.job
        planned = [plan for plan in job.all_plans if plan.spec is not None]
        quantized = sum(map(job.planned_bytes, planned))
        kept = sum(kept_bytes(table, job) for table in self.tables)
        others = sum(part.planned_bytes for part in parts(job)) - quantized - kept
        n_tensors = sum(1 for _ in job.model.named_parameters())
        n_tensors += 3 * (len(planned) + len(self.tables))
        return int(budget.n_bytes - others - HEADER_BYTES * n_tensors)

    def choose(self, costs: Costs, budget: Budget) -> Choice:
        """The least estimated loss within a budget. Raises `LlmqError` for one that is too
        small."""
        items = [self._item(group, costs) for group in self.groups]
        items += self._table_items(costs)
        allowed = self.allowed_bytes(budget) - self.fixed_bytes
        if (least := least_bytes(items)) > allowed:
            raise self._too_small(budget, least - allowed, least)
        chosen = allocate(items, allowed)
        pairs = zip(self.groups, chosen[: len(self.groups)], strict=True)
        specs: dict[str, QuantSpec] = {}
        for group, number in pairs:
            specs |= self.options_of(group)[number]
        return self.choice(specs, costs, chosen[len(self.groups) :])

    def choice(
        self, specs: dict[str, QuantSpec], costs: Costs, of_tables: Sequence[int] = ()
    ) -> Choice:
        """A choice among the candidates that is given. of_tables: the number of the candidate of
        each, 0 to keep it."""
        in_order = {name: fitted(specs[name], costs[name]) for name in self.candidates}
        tables = {
            table: fitted(self.tables[table][number - 1], costs[table.name])
            for table, number in zip(self.tables, of_tables, strict=False)
            if number
        }
        every = in_order | {table.name: spec for table, spec in tables.items()}
        n_bytes = sum(self._bytes(name, spec) for name, spec in every.items())
        cost = sum(costs[name][str(spec)].nats for name, spec in every.items())
        n_weights = self.n_weights + sum(prod(table.shape) for table in tables)
        return Choice(
            in_order, tuple(self.experts), tables, self.fixed_bytes + n_bytes, n_weights, cost
        )

    def uniform(self, costs: Costs, budget: Budget) -> Choice | None:
        """The best choice of one width for all layers, with as many bytes as the budget has or
        some less; None where there is none that near. Tables get what is left."""
        allowed = self.allowed_bytes(budget)
        found = []
        for specs in self.options_of(list(self.candidates)):
            found += self._with_tables(specs, costs, allowed)
        return min(found, key=lambda choice: choice.cost, default=None)

    def _with_tables(self, specs: dict[str, QuantSpec], costs: Costs, allowed: int) -> list[Choice]:
        """A choice for the layers with the best one for tables beside it, if there is one that
        takes about as much as is allowed."""
        left, items = allowed - self.choice(specs, costs).n_bytes, self._table_items(costs)
        if least_bytes(items) > left:
            return []
        numbers = allocate(items, left) if items else []
        left -= sum(item.n_bytes[number] for item, number in zip(items, numbers, strict=True))
        is_near = left <= (1 - ABOUT_EQUAL) * allowed
        return [self.choice(specs, costs, numbers)] if is_near else []

    def _table_items(self, costs: Costs) -> list[Item]:
        """Candidate 0 of each is to keep it."""
        return [self._table_item(table, costs) for table in self.tables]

    def _table_item(self, table: Table, costs: Costs) -> Item:
        specs = self.tables[table]
        nats = [costs[table.name][str(spec)].nats for spec in specs]
        n_bytes = [self._size(table.name, spec, costs) for spec in specs]
        return Item((0.0, *nats), (kept_bytes(table, self.job), *n_bytes))

    def _item(self, group: Sequence[str], costs: Costs) -> Item:
        options = self.options_of(group)
        nats = [
            sum(costs[name][str(spec)].nats for name, spec in option.items()) for option in options
        ]
        n_bytes = [
            sum(self._size(name, spec, costs) for name, spec in option.items())
            for option in options
        ]
        return Item(tuple(nats), tuple(n_bytes))

    def _size(self, name: str, spec: QuantSpec, costs: Costs) -> int:
        return self._bytes(name, fitted(spec, costs[name]))

    def _bytes(self, name: str, spec: QuantSpec) -> int:
        return self.job.bytes_of(spec, self.shapes[name], self._roles.get(name, ""))

    @cached_property
    def _roles(self) -> dict[str, str]:
        return {table.name: table.role for table in self.tables}

    def _too_small(self, budget: Budget, missing: int, least: int) -> LlmqError:
        if budget.n_bytes is not None:
            hint = "" if self.tables or self.job.fmt.is_own else _HINT
            return LlmqError(
                f"{budget}: the smallest choice takes {missing} bytes more; give --max-bytes "
                f"{budget.n_bytes + missing} or more{hint}"
            )
        bits = 8 * (least + self.fixed_bytes) / self.n_weights
        return LlmqError(f"{budget}: the smallest choice for every layer takes {bits:.4f} bits")


def fitted(spec: QuantSpec, costs: Mapping[str, Cost]) -> QuantSpec:
    """A candidate with the scale dtype that holds the scales of a layer. costs: of the layer."""
    return replace(spec, scale_dtype=costs[str(spec)].scale_dtype)  # type: ignore[arg-type]


def _kind(spec: QuantSpec) -> tuple[int, bool, bool]:
    """What layers that get bits together have in common; group sizes are as their columns allow."""
    return spec.bits, spec.symmetric, spec.group_size == PER_ROW
