"""The YAML head of a card: what is read of a source's, and what the card of a result has."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llmq.errors import LlmqError, LlmqWarning
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_bytes
from llmq.storage.yaml_files import parse_yaml

CARD = "README.md"
_NAME = "llmq"
# What is as true of a result as of the model that it was made of.
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
MAX_BYTES = 2 << 20
_HEAD = re.compile(rb"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Tags about how weights are stored, which are another result's.
_OF_WEIGHTS = {
    _NAME,
    "quantized",
    "gptq",
    "gptq_v2",
    "awq",
    "bitnet",
    "compressed-tensors",
    "gguf",
    "safetensors",
    "pytorch",
    "ternary",
}
_BITS = re.compile(r"\d+-?bits?|[wq]\d\w*|int\d+|fp\d+", re.IGNORECASE)


def is_of_llmq(path: Path) -> bool:
    """Whether a file is a card that llmq wrote, by its tags."""
    return _NAME in _texts(read_head(path).get("tags"))


def read_head(path: Path) -> dict[str, Any]:
    """What the head of a card says, by key; nothing without a card or a head. Warns of a head that
    cannot be read: it says nothing of the weights."""
    if not path.is_file():
        return {}
    remedy = "licence, language and tags of the source are not in the new card: add them by hand"
    try:
        found = _HEAD.match(read_bytes(path, "a model card", remedy, MAX_BYTES))
        if found is None:
            return {}
        with reading(path, "its head cannot be read", remedy):
            head = parse_yaml(found[1])
            if not isinstance(head, dict):
                raise TypeError(f"expected keys and values, got {type(head).__name__}")
    except LlmqError as error:
        warnings.warn(str(error), LlmqWarning, stacklevel=2)
        return {}
    return head


def carried(head: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys of a source's head that the result's has again, with values that are text."""
    texts = {key: _texts(head.get(key)) for key in CARRIED}
    texts["tags"] = [tag for tag in texts["tags"] if not _is_of_weights(tag)]
    return {
        key: values if isinstance(head[key], list) else values[0]
        for key, values in texts.items()
        if values
    }


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    # YAML takes the language code of Norwegian for "not".
    values = ["no" if each is False else each for each in values]
    return [each for each in values if isinstance(each, str) and each.strip()]


def _is_of_weights(tag: str) -> bool:
    return tag.lower() in _OF_WEIGHTS or _BITS.fullmatch(tag) is not None


def render_head(keys: Mapping[str, Any]) -> str:
    """YAML of these keys between lines of dashes; those without a value are left out."""
    known = {key: value for key, value in keys.items() if value}
    return f"---\n{ModelCardData(**known).to_yaml()}\n---\n"
