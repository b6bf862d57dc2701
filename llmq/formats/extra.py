"""Tensors that a folder stores and the class of its model does not load: they go where the model
goes, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.models.keep import is_extra_layer
from llmq.models.shards import ShardReader
from llmq.models.source import Source


def matrices_among(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Modules of which a matrix is stored. shapes: of tensors by name."""
    weights = [name for name, shape in shapes.items() if len(shape) == 2]
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def extra_tensors(
    model: PreTrainedModel, source_dir: Path, shards: ShardReader | None = None
) -> dict[str, Tensor]:
    """What the folder that a model was loaded from has of layers that its class does not load (see
    `llmq.models.keep`), in bfloat16 what is stored in few bits. shards: of that folder, where it is
    open."""
    try:
        shards = shards or Source(source_dir).decoded
    except LlmqError:  # of a folder that has gone, or has weights of another kind
        return {}
    names = [name for name in shards.names if is_extra_layer(name, model.config)]
    return shards.read(names)
