"""The `quantization_config` of a folder, as llmq reads it: who wrote it in which layout, with every
value that decides a weight checked.

A value that is not understood is never replaced by a usual one: a folder read by other rules than
it was written by gives numbers that look like weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llmq.errors import LlmqError
from llmq.formats.base import OWN_METHOD, Format
from llmq.formats.engine_rules import Result
from llmq.formats.engines import Reading, readings
from llmq.formats.foreign import refusal
from llmq.formats.registry import NAMES, all_formats, detect, format_named
from llmq.formats.setting_types import as_settings
from llmq.grid.spec import QuantSpec
from llmq.models.source import Source


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` as llmq reads it, or None for a full-precision model. Raises
    `LlmqError` for a method, a layout or a value that llmq cannot read."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = as_settings(settings)
    if settings.get("quant_method") == OWN_METHOD:  # also what was read once before
        own = format_of(settings)
        return own.check_read({**settings, "format": own.name})  # which is llmq's own unnamed
    fmt = detect(settings)
    if fmt is None:
        methods = dict.fromkeys(fmt.quant_method for fmt in all_formats())
        raise refusal(settings, list(methods))
    return fmt.read_config(settings)


def format_of(settings: dict[str, Any]) -> Format:
    """The format that settings of `quant_method` "llmq" name. Raises `LlmqError`."""
    name = settings.get("format", OWN_METHOD)
    if not isinstance(name, str) or name not in NAMES:
        raise LlmqError(
            f"quantization_config: format {name!r}: expected one of {', '.join(NAMES)}; install "
            "the llmq that wrote it, or quantize the original model"
        )
    return format_named(name)


def stored_result(settings: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Result | None:
    """What engines are asked about, of a folder: its settings, as they are read, and the shapes of
    its tensors by name. None where the settings alone do not say how layers are quantized."""
    fmt = format_of(settings)
    packed = {name.rpartition(".")[0] for name in shapes if name.endswith(f".{fmt.marker}")}
    if not packed:
        return None
    specs: dict[str, QuantSpec | None] = {}
    for name, shape in shapes.items():
        layer, _, suffix = name.rpartition(".")
        if layer in packed and layer not in specs:
            specs[layer] = fmt.stated_spec(layer, settings)
            if specs[layer] is None:
                return None
        elif layer not in packed and suffix == "weight" and len(shape) == 2:
            specs[layer] = None
    activations = fmt.activations_of(min(packed), settings)
    return Result(fmt.name, specs, activations, fmt.states_order(settings))


def folder_readings(source: Source) -> list[Reading] | None:
    """What every engine makes of a folder, None where its settings do not tell."""
    settings = quantization_settings(copy.deepcopy(source.config))
    result = None if settings is None else stored_result(settings, source.shards.shapes)
    return None if result is None else readings(result)
