"""A budget of bits, and what layers get within one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmq.arguments import check_type
from llmq.errors import LlmqError
from llmq.grid.spec import QuantSpec
from llmq.models.outside import Table
from llmq.ptq.expert_costs import expert_of
from llmq.ptq.mixed_tables import with_tables
from llmq.recipe import Recipe, Rule


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
    """specs: by name of layer, of those that take part. experts: modules that hold experts. tables:
    embeddings and head, those that are not kept. n_bytes, n_weights: of everything that is
    quantized. cost: what all of it is estimated to lose together, in nats per token."""

    specs: dict[str, QuantSpec]
    experts: tuple[str, ...]
    tables: dict[Table, QuantSpec]
    n_bytes: int
    n_weights: int
    cost: float

    @property
    def bits(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    @property
    def decides(self) -> tuple[dict[str, QuantSpec], dict[Table, QuantSpec]]:
        """What it says."""
        return self.specs, self.tables

    def recipe(self, base: Recipe) -> Recipe:
        """The base with a rule for each layer; it can be run again without measuring."""
        rules = tuple(Rule(name, spec) for name, spec in _by_pattern(self.specs, self.experts))
        return with_tables(replace(base, rules=(*rules, *base.rules)), self.tables)

    def to_json(self) -> dict[str, Any]:
        n_layers: dict[str, int] = {}
        for spec in self.specs.values():
            n_layers[str(spec)] = n_layers.get(str(spec), 0) + 1
        return {
            "bits_per_quantized_weight": round(self.bits, 4),
            "estimated_kl": self.cost,
            "layers_by_spec": n_layers,
            "outside": {table.role: str(spec) for table, spec in self.tables.items()},
        }


def _by_pattern(
    specs: Mapping[str, QuantSpec], modules: Sequence[str]
) -> Iterator[tuple[str, QuantSpec]]:
    """Patterns of names and what the layers get, one for a part of all experts of a module where
    these are alike: a hundred experts would make thousands of rules."""
    of_parts: dict[tuple[str, str], set[QuantSpec]] = {}
    places = {name: expert_of(name, modules) for name in specs}
    for name, place in places.items():
        if place is not None:
            of_parts.setdefault((place[0], place[2]), set()).add(specs[name])
    alike = {key: found.pop() for key, found in of_parts.items() if len(found) == 1}
    for name, place in places.items():
        if place is None or (place[0], place[2]) not in alike:
            yield name, specs[name]
    for (module, part), spec in alike.items():
        yield f"{module}.*.{part}", spec
