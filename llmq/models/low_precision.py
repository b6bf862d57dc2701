"""Sources that are published in few bits and nothing else: FP8 in blocks (DeepSeek, MiniMax) and
MXFP4 (gpt-oss). There is no other model to start from, so they count as full precision, and every
matrix is decoded to bfloat16 when it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmq.errors import LlmqError
from llmq.models.mxfp4_views import Mxfp4View, mxfp4_views
from llmq.models.scaled_views import ScaledView, scaled_views
from llmq.models.shards import ShardReader
from llmq.models.tensors import ViewedTensors

METHODS = ("fp8", "mxfp4")  # of `quantization_config`, as transformers calls them
_REMEDY = "compare it with the quantization_config of the original checkpoint"


def stated_settings(stated: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` in config.json, or in that of its text model, where it is one of
    these. stated: the object in the file."""
    for part in (stated, stated.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(settings, dict) and settings.get("quant_method") in METHODS:
            return settings
    return None


def decoded(shards: ShardReader, stated: Mapping[str, Any]) -> ShardReader:
    """The tensors of a folder, those of few bits as bfloat16. stated: the object in config.json.
    Raises `LlmqError` for scales without what they belong to."""
    views: dict[str, ScaledView | Mxfp4View] = {**scaled_views(shards, _block(stated))}
    views |= mxfp4_views(shards)
    return ViewedTensors(shards, views) if views else shards


def kinds(tensors: ShardReader) -> dict[str, int]:
    """How many tensors are decoded, by what they are stored as."""
    if not isinstance(tensors, ViewedTensors):
        return {}
    found = (kind_of(tensors, name) for name in tensors.views)
    return dict(Counter(kind for kind in found if kind is not None))


def kind_of(tensors: ShardReader, name: str) -> str | None:
    """What one is stored as that is decoded while it is read, None for one that is not."""
    if not isinstance(tensors, ViewedTensors):
        return None
    view = tensors.views.get(name)
    if view is None:
        return kind_of(tensors.shards, name)
    return view.kind or kind_of(tensors.shards, view.stored[0])


def _block(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as config.json says."""
    size = (stated_settings(stated) or {}).get("weight_block_size")
    if size is None:
        return None
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(each) is int and each > 0 for each in size):
        raise LlmqError(
            f"quantization_config: weight_block_size {str(size)[:80]}: expected [rows, columns] or "
            f"null; {_REMEDY}"
        )
    return size[0], size[1]
