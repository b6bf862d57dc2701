"""What candidates cost the experts of a mixture.

Measured are the experts that see most tokens, so that a block of a hundred takes no hundred times
of a dense one and few rows are no matter; each other one is taken to lose as much per token that it
gets. Layers that read a module's inputs share the statistics of all experts that are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from llmq.grid.spec import QuantSpec
from llmq.models.arch import linear_weight
from llmq.models.experts import DOWN
from llmq.ptq.costs import Cost
from llmq.ptq.scales import fitting_spec

MEASURED = 8  # experts of a module


def measured_experts(rows: Tensor) -> list[int]:
    """Numbers of those that are measured. rows: of each expert, int64 `[E]`."""
    order = rows.argsort(descending=True, stable=True)[:MEASURED].tolist()
    return sorted(number for number in order if rows[number])


def expert_of(layer: str, modules: Iterable[str]) -> tuple[str, int, str] | None:
    """Module, number and part of an expert's layer, None for another. modules: names of those that
    hold experts, on the same way as the layer's."""
    for module in modules:
        if layer.startswith(f"{module}."):
            number, _, part = layer.removeprefix(f"{module}.").partition(".")
            return (module, int(number), part) if number.isdigit() else None
    return None


def layers_to_measure(names: Sequence[str], rows: Mapping[str, Tensor]) -> list[str]:
    """Those layers of a block whose costs are measured. rows: of its experts, by module."""
    chosen = {module: set(measured_experts(own)) for module, own in rows.items()}
    found = []
    for name in names:
        expert = expert_of(name, rows)
        if expert is None or expert[1] in chosen[expert[0]]:
            found.append(name)
    return found


def expert_groups(names: Sequence[str], modules: Iterable[str]) -> list[list[str]]:
    """Layers of experts that read the same inputs."""
    groups: dict[tuple[str, int, bool], list[str]] = {}
    modules = list(modules)
    for name in names:
        if (expert := expert_of(name, modules)) is not None:
            groups.setdefault((expert[0], expert[1], expert[2] == DOWN), []).append(name)
    return list(groups.values())


def pool_of(layer: str, modules: Iterable[str]) -> str:
    """What layers have in common whose inputs are of one kind."""
    expert = expert_of(layer, modules)
    return layer if expert is None or expert[2] == DOWN else expert[0]


def costs_of_others(
    block: nn.Module,
    rows: Mapping[str, Tensor],
    candidates: Mapping[str, Sequence[QuantSpec]],
    measured: Mapping[str, Sequence[Cost]],
) -> dict[str, list[Cost]]:
    """Those of experts that were not measured. candidates, measured: by name in the block."""
    found = {}
    per_row = _per_row(rows, measured)
    for name, specs in candidates.items():
        expert = expert_of(name, rows)
        if expert is None or name in measured:
            continue
        module, number, part = expert
        weight = linear_weight(block.get_submodule(name))
        fitting = [fitting_spec(weight, spec) for spec in specs]
        found[name] = [
            Cost(float(rows[module][number]) * nats, spec.scale_dtype)
            for nats, spec in zip(per_row[module, part], fitting, strict=True)
        ]
    return found


def _per_row(
    rows: Mapping[str, Tensor], measured: Mapping[str, Sequence[Cost]]
) -> dict[tuple[str, str], list[float]]:
    """Costs of one token, by module and part of its experts."""
    sums: dict[tuple[str, str], list[float]] = {}
    n_rows: dict[tuple[str, str], int] = {}
    for name, costs in measured.items():
        if (expert := expert_of(name, rows)) is None:
            continue
        module, number, part = expert
        before = sums.get((module, part), [0.0] * len(costs))
        sums[module, part] = [a + cost.nats for a, cost in zip(before, costs, strict=True)]
        n_rows[module, part] = n_rows.get((module, part), 0) + int(rows[module][number])
    return {key: [nats / n_rows[key] for nats in own] for key, own in sums.items()}
