"""Sizes that a config may ask for, checked before anything is built from them: a model of 10^6
layers or an embedding of 2^40 rows would keep the machine busy until its memory is gone."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from llmq.errors import LlmqError
from llmq.models import compat

_LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
]
_WIDTHS = ["hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "head_dim"]
_INNER = ["intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"]
_HEADS = [
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_key_value_heads",
    "num_kv_heads",
]
_POSITIONS = ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"]
LIMITS: dict[str, int] = {
    **dict.fromkeys(_LAYERS, 10_000),
    **dict.fromkeys(_WIDTHS, 1 << 20),
    **dict.fromkeys(_INNER, 1 << 24),
    **dict.fromkeys(_HEADS, 1 << 16),
    **dict.fromkeys(_POSITIONS, 1 << 31),
    "vocab_size": 1 << 27,
    "num_labels": 100_000,
}
LARGEST = 2**63 - 1
# What no model has that is not absurd; from here on the stored tensors are asked.
MANY_LAYERS = 256
MANY_EMBEDDINGS = 1 << 33
MANY_POSITIONS = 1 << 14
MAX_BUFFER_ELEMENTS = 1 << 28
_LEAST_BYTES = 1 / 8  # that a parameter takes on disk: a bit


def check_sizes(settings: dict[str, Any], model_dir: Path) -> None:
    """Raise `LlmqError` for a config (the object in config.json) with sizes that no model has, or
    that the weight files of its folder cannot fill."""
    for owner, key, value in _numbers(settings):
        where = f"{model_dir / 'config.json'}: {owner}{key} = {value!r}"
        if abs(value) > LARGEST:
            raise LlmqError(f"{where}: no size, expected at most 2^63 - 1; {_REMEDY}")
        limit = LIMITS.get(key)
        if limit is not None and not 0 <= value <= limit:
            raise LlmqError(f"{where}: expected a whole number up to {limit}; {_REMEDY}")
    text = settings.get("text_config")
    parts = [settings, text] if isinstance(text, dict) else [settings]
    for part in parts:
        _check_positions(part, model_dir)
    n_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors") if path.is_file())
    if not n_bytes:
        return
    for part in parts:
        _check_filled(part, n_bytes, model_dir)


_REMEDY = "compare it with that of the original model"


def _check_positions(part: dict[str, Any], model_dir: Path) -> None:
    """Positions are counted against before anything of transformers looks at their type."""
    for key in _POSITIONS:
        value = part.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise LlmqError(
                f"{model_dir / 'config.json'}: {key} = {value!r}: expected a whole number; "
                f"{_REMEDY}"
            )


def _check_filled(part: dict[str, Any], n_bytes: int, model_dir: Path) -> None:
    layers = max((_whole(part.get(name)) for name in _LAYERS), default=0)
    if layers > MANY_LAYERS and layers > (n := _stored_tensors(model_dir)):
        raise LlmqError(
            f"{model_dir / 'config.json'}: {layers} layers, but the weight files hold {n} tensors; "
            f"{_REMEDY}"
        )
    width = max((_whole(part.get(name)) for name in _WIDTHS[:4]), default=0)
    embeddings = _whole(part.get("vocab_size")) * width
    if embeddings > MANY_EMBEDDINGS and embeddings * _LEAST_BYTES > n_bytes:
        raise LlmqError(
            f"{model_dir / 'config.json'}: embeddings of {embeddings} elements, but the weight "
            f"files have {n_bytes} bytes; {_REMEDY}"
        )


def _stored_tensors(model_dir: Path) -> int:
    """Tensors in the safetensors files of a folder, as their headers say; what cannot be read
    counts as none, and whoever needs it says why."""
    return sum(map(_tensors_of, model_dir.glob("*.safetensors")))


def _tensors_of(path: Path) -> int:
    try:
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > min(100 << 20, path.stat().st_size):
                return 0
            header = json.loads(file.read(n_header))
            return len(header) if isinstance(header, dict) else 0
    except (OSError, ValueError, RecursionError):
        return 0


def _numbers(settings: dict[str, Any], owner: str = "") -> Iterator[tuple[str, str, int]]:
    """Every whole number of a config with its key, those of configs inside and of lists, too."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{owner}{key}.")
        elif isinstance(value, list):
            yield from ((owner, key, n) for n in value if type(n) is int)
        elif type(value) is int:
            yield owner, key, value


def _whole(value: object) -> int:
    return value if type(value) is int else 0


def check_buffers(config: PretrainedConfig, where: Path) -> None:
    """Raise `LlmqError` for tables that a model computes when it is built, such as masks of
    positions x positions, when they would fill the memory. Known from one layer of it, built
    without memory; a family that cannot be built so is left to the limits of `check_sizes`."""
    text = config.get_text_config()
    positions = max(_whole(getattr(text, name, None)) for name in _POSITIONS)
    if positions <= MANY_POSITIONS:
        return
    shallow = copy.deepcopy(config)
    depth = _whole(getattr(text, "num_hidden_layers", None))
    try:
        shallow.get_text_config().num_hidden_layers = 1
        with torch.device("meta"):
            model = compat.auto_class(shallow).from_config(shallow, dtype=torch.float32)
    except Exception:  # of a family whose tables need values; or a config that is told of later
        return
    inside = itertools.chain.from_iterable(block.buffers() for block in model.modules())
    largest = max((buffer.numel() for buffer in inside), default=0)
    if largest * max(1, depth) > MAX_BUFFER_ELEMENTS * 16 or largest > MAX_BUFFER_ELEMENTS:
        raise LlmqError(
            f"{where}: positions for {positions} tokens need a table of {largest} elements in "
            f"{depth} layers; {_REMEDY}"
        )
