"""What the bytes of a model are spent on, before and after: layers by spec, embeddings, head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from llmq.models import compat
from llmq.models.arch import tower_parameters
from llmq.models.outside import EMBEDDINGS, HEAD, TIED
from llmq.ptq.job import Job

KEPT, REST, OTHERS = "layers that are kept", "norms, biases and others", "other parts of the model"


@dataclass(frozen=True)
class Part:
    """spec: of what is quantized, else None. n_tensors, n_weights: how many. source_bytes: as they
    are stored. planned_bytes: as they will be."""

    name: str
    spec: str | None
    n_tensors: int
    n_weights: int
    source_bytes: float
    planned_bytes: float

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "spec": self.spec,
            "tensors": self.n_tensors,
            "weights": self.n_weights,
            "source_bytes": int(self.source_bytes),
            "planned_bytes": int(self.planned_bytes),
        }

    def __add__(self, other: Part) -> Part:
        return Part(
            self.name,
            self.spec,
            self.n_tensors + other.n_tensors,
            self.n_weights + other.n_weights,
            self.source_bytes + other.source_bytes,
            self.planned_bytes + other.planned_bytes,
        )


def element_bytes(job: Job) -> float:
    """Bytes of a weight in full precision, on average."""
    return job.source.decoded_bytes / n_weights_of(job)


def n_weights_of(job: Job) -> int:
    """Weights of the whole model, tied ones once."""
    return max(1, sum(n for _, n in _sizes(job)))


def parts(job: Job) -> list[Part]:
    """Every part of the model, the largest first."""
    found: dict[tuple[str, str | None], Part] = {}
    for part in _single_parts(job):
        key = (part.name, part.spec)
        found[key] = found[key] + part if key in found else part
    return sorted(found.values(), key=lambda part: -part.planned_bytes)


def _single_parts(job: Job) -> Iterator[Part]:
    n_all = n_weights_of(job)
    element, stored = job.source.decoded_bytes / n_all, job.source.weight_bytes / n_all
    plans = {f"{plan.layer.name}.weight": plan for plan in job.all_plans}
    names = _outside_names(job)
    for name, n_weights in _sizes(job):
        before, after = n_weights * stored, n_weights * element
        part, spec = names.get(name, REST), None
        if (plan := plans.get(name)) is not None:
            part = plan.role or KEPT
            if plan.spec is not None:
                part, spec = plan.role or "layers", str(plan.spec)
                after = job.planned_bytes(plan)
        yield Part(part, spec, 1, n_weights, before, after)


def _sizes(job: Job) -> list[tuple[str, int]]:
    """Every stored parameter, and the tensors that the model has no place for as one."""
    ties = compat.ties(job.model)
    sizes = [
        (name, prod(parameter.shape))
        for name, parameter in job.model.named_parameters()
        if name not in ties
    ]
    if job.n_others:
        sizes.append((OTHERS, job.n_others))
    return sizes


def _outside_names(job: Job) -> dict[str, str]:
    """What to call the tensors that are outside of the blocks."""
    names = {
        f"{name}.weight": EMBEDDINGS
        for name, module in job.model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    names |= dict.fromkeys(tower_parameters(job.model), OTHERS)
    names[OTHERS] = OTHERS
    head, embeddings = job.model.get_output_embeddings(), job.model.get_input_embeddings()
    for name, module in job.model.named_modules():
        if module is head and f"{name}.weight" not in compat.ties(job.model):
            names[f"{name}.weight"] = HEAD
        if module is embeddings and compat.ties(job.model):
            names[f"{name}.weight"] = TIED
    return names
