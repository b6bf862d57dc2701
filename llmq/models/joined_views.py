"""Tensors of a model that a folder stores in several parts, one below the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.models import compat
from llmq.models.shards import ShardReader
from llmq.models.tensors import Slices, View


@dataclass(frozen=True)
class JoinedView(View):
    """Parts `[n, ...]` of `sizes` rows each as one tensor."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    sizes: tuple[int, ...]

    def read(self, slices: Slices) -> Tensor:
        return torch.cat([slices(name)[:] for name in self.stored])

    def parts_of(self, name: str) -> tuple[str, ...]:
        return self.stored

    def as_stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        parts = tensor.split(self.sizes)
        return {part: rows.clone() for part, rows in zip(self.stored, parts, strict=True)}


def joined_views(model: PreTrainedModel, shards: ShardReader) -> dict[str, JoinedView]:
    """The views of a folder by the names that the model has for them."""
    state = model.state_dict()
    parts: dict[str, dict[int, str]] = {}
    for each in compat.renamed(model, shards.names):
        if each.is_joined and each.part is not None and each.name in state:
            parts.setdefault(each.name, {})[each.part] = each.stored
    views = {}
    for name, found in parts.items():
        stored = tuple(found[part] for part in sorted(found))
        sizes = tuple(shards.shapes[part][0] for part in stored)
        shape = (sum(sizes), *shards.shapes[stored[0]][1:])
        views[name] = JoinedView(stored, shape, shards.dtypes[stored[0]], sizes)
    return views
