"""A model of which there is only a config: enough to plan with, and for nothing else."""

from __future__ import annotations

import os
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from llmq.models import compat
from llmq.models.shards import INDEX, ShardReader
from llmq.models.source import Source, meta_model

# What safetensors calls the dtypes that models are stored in.
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class AssumedTensors(ShardReader):
    """The tensors that the config describes, in the dtype that it names. Nothing can be read."""

    def __init__(self, source: Source) -> None:
        self.model_dir = source.folder
        self.start = "model.safetensors"
        model, path = meta_model(source.config), source.folder / self.start
        ties = compat.ties(model)
        tensors = {name: each for name, each in model.state_dict().items() if name not in ties}
        dtype = source.config.get_text_config().dtype or source.config.dtype
        self.names: dict[str, Path] = dict.fromkeys(tensors, path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = dict.fromkeys(tensors, _NAMES.get(dtype, "BF16"))

    @property
    def n_bytes(self) -> int:
        """What they would take on disk."""
        size = {name: dtype.itemsize for dtype, name in _NAMES.items()}
        return sum(prod(self.shapes[name]) * size[self.dtypes[name]] for name in self.names)


class ConfigOnly(Source):
    """A folder without weights."""

    @cached_property
    def shards(self) -> AssumedTensors:
        """What would be stored."""
        return AssumedTensors(self)

    @property
    def decoded(self) -> AssumedTensors:  # type: ignore[override]
        """The same: in the dtype of the config."""
        return self.shards

    @property
    def tensors(self) -> AssumedTensors:  # type: ignore[override]
        """The same: each layer is stored by itself."""
        return self.shards

    @property
    def weight_bytes(self) -> int:
        """The size that the files would have."""
        return self.shards.n_bytes


def open_to_plan(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """`Source.open`, and a `ConfigOnly` for a folder that has a config and no weights of any
    kind."""
    source = Source.open(model, revision)
    files = {path.name for path in source.folder.iterdir()}
    has_weights = INDEX in files or any(
        name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth")) for name in files
    )
    return source if has_weights else ConfigOnly(source.folder)
