"""The weights of single experts, read out of what a folder stores: its own tensor for each, under
names that transformers has rules for, or one tensor for all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.experts import BIAS, LAYERS_OF, Layout, UnfusedExperts, unfused_in
from llmq.models.shards import ShardReader
from llmq.models.tensors import Slices, View

_NUMBER = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertView(View):
    """One layer of one expert, out of a tensor of all. is_flipped: stored with the two dimensions
    of a matrix exchanged."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    expert: int
    layer: str
    layout: Layout
    is_flipped: bool = False

    def read(self, slices: Slices) -> Tensor:
        part: Tensor = slices(self.stored[0])[self.expert]
        if part.dim() == 2:
            part = self.layout.matrix(part.T if self.is_flipped else part)
        # A copy, also of what lies as it should: the rest of the matrix is not to stay with it.
        return self.layout.cut(part, self.layer).clone(memory_format=torch.contiguous_format)


def may_hold_experts(shards: ShardReader) -> bool:
    """Whether a folder stores tensors that may be those of several experts."""
    return any(len(shape) == 3 for shape in shards.shapes.values())


def number_of_expert(stored: str) -> int | None:
    """The number of the expert that a stored tensor is of alone, None for any other tensor."""
    found = _NUMBER.search(stored)
    return None if found is None else int(found[1])


def fused_names(experts: Mapping[str, UnfusedExperts]) -> Iterator[str]:
    """The parameters that the model's class has in place of these experts."""
    for name, module in experts.items():
        for parameter in module.layout.parameters:
            yield f"{name}.{parameter}"


def layer_of_expert(experts: Mapping[str, UnfusedExperts], renamed: compat.Renamed) -> str | None:
    """The parameter that a stored tensor of one expert is, which transformers would merge with
    those of others; None for any other tensor."""
    name, _, parameter = renamed.name.rpartition(".")
    number = number_of_expert(renamed.stored)
    if renamed.part is None or number is None or name not in experts:
        return None
    if parameter not in LAYERS_OF:
        return None
    layer = LAYERS_OF[parameter][renamed.part]
    return f"{name}.{number}.{layer}.weight"


def expert_views(model: PreTrainedModel, shards: ShardReader) -> dict[str, ExpertView]:
    """The layers of experts that are stored in one tensor, by names such as an expert's own tensor
    would have. Raises `LlmqError` for a tensor whose shape is not the one of the model."""
    experts = unfused_in(model)
    views: dict[str, ExpertView] = {}
    fused = set(fused_names(experts))
    for each in compat.renamed(model, shards.names, fused):
        if each.name in fused and number_of_expert(each.stored) is None:
            name, _, parameter = each.name.rpartition(".")
            views |= _views(experts[name], each, parameter, shards)
    return views


def _views(
    module: UnfusedExperts, renamed: compat.Renamed, parameter: str, shards: ShardReader
) -> dict[str, ExpertView]:
    """The views of one stored tensor."""
    layout, weight = module.layout, parameter.removesuffix(BIAS)
    first = module.expert(0)
    layers = {name: first.layer(name) for name in LAYERS_OF[weight]}
    n = sum(layer.out_features for layer in layers.values())
    k = first.layer(LAYERS_OF[weight][0]).in_features
    expected: tuple[int, ...] = (k, n) if layout.is_transposed else (n, k)
    if parameter.endswith(BIAS):
        expected = (n,)
    stored, shape = renamed.stored, shards.shapes[renamed.stored]
    is_flipped = shape[1:] != expected and shape[1:] == expected[::-1] and renamed.is_converted
    if shape[0] < module.n_experts or (shape[1:] != expected and not is_flipped):
        raise LlmqError(
            f"{shards.names[stored]}: tensor {stored} has shape {list(shape)}, expected "
            f"{[module.n_experts, *expected]} for {module.n_experts} experts; config.json does not "
            "belong to these weights"
        )
    prefix = _prefix(renamed, parameter)
    kind = "bias" if parameter.endswith(BIAS) else "weight"
    views = {}
    for index in range(module.n_experts):
        for name, layer in layers.items():
            own = (layer.out_features, layer.in_features)[: 1 if kind == "bias" else 2]
            views[f"{prefix}.{index}.{name}.{kind}"] = ExpertView(
                (stored,), own, shards.dtypes[stored], index, name, layout, is_flipped
            )
    return views


def _prefix(renamed: compat.Renamed, parameter: str) -> str:
    """Where an expert's own tensors would lie: beside the stored one, where that is called as in
    the model."""
    if renamed.stored.endswith(f".experts.{parameter}"):
        return renamed.stored.removesuffix(f".{parameter}")
    return renamed.name.removesuffix(f".{parameter}")
