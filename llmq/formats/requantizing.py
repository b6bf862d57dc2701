"""Folders that are quantized already, as sources: every packed layer is read as bfloat16, one at a
time, and what is behind sees a model in full precision.

Whoever rounds what is rounded loses twice, so this is done only where it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmq.errors import LlmqError
from llmq.formats.base import Format
from llmq.formats.layers import StoredLayers
from llmq.formats.settings import format_of, quantization_settings
from llmq.models.arch import weight_as_stored
from llmq.models.config_only import ConfigOnly
from llmq.models.shards import ShardReader
from llmq.models.source import Source, forget_quantization
from llmq.models.tensors import Slices, View, ViewedTensors
from llmq.storage.json_files import read_object

_STAMP = "gguf.json"  # in a folder that a .gguf file was unpacked into
_DENSE_TYPES = frozenset({"F32", "F16", "BF16"})
_OPTION = "--allow-requantize (in Python allow_requantize=True)"
_SHARED = frozenset({"weight", "bias"})  # what layers that are not packed have, too


def full_precision(source: Source, allow_requantize: bool = False) -> Source:
    """The source, or one that reads its packed layers as bfloat16. Raises `LlmqError` for a
    quantized one that is not to be quantized again, and for one that cannot be."""
    if getattr(source.config, "quantization_config", None) is None:
        return source
    what = _what(source)
    if what is not None and not allow_requantize:
        raise LlmqError(
            f"{source.folder}: is quantized already ({what}), and what is rounded again loses "
            f"twice; start from the full-precision model or, where there is none, add {_OPTION}"
        )
    settings = quantization_settings(copy.deepcopy(source.config))
    assert settings is not None
    if format_of(settings).is_online(settings):
        raise LlmqError(
            f"{source.folder}: holds weights in full precision that are rounded while they are "
            "loaded (online); take quantization_config out of a copy of its config.json to "
            "quantize them otherwise"
        )
    if isinstance(source, ConfigOnly):
        found = ConfigOnly(source.folder)
        forget_quantization(found.config)
        return found
    return RequantizedSource(source)


def _what(source: Source) -> str | None:
    """What a quantized folder is, in a few words; None for a `.gguf` file that holds real numbers
    alone."""
    path = source.folder / _STAMP
    if not path.is_file():
        settings: Any = source.config.quantization_config  # type: ignore[attr-defined]
        if not isinstance(settings, dict):
            return str(getattr(settings, "quant_method", settings))
        return str(settings.get("quant_method"))
    stamp = read_object(path, "what a folder was unpacked from")
    packed = {kind: n for kind, n in stamp["types"].items() if kind not in _DENSE_TYPES}
    kinds = ", ".join(f"{kind} x {n}" for kind, n in packed.items())
    return f"{stamp['name']}: {kinds}" if packed else None


class RequantizedSource(Source):
    """A quantized folder that is read as a model in full precision."""

    def __init__(self, packed: Source) -> None:
        self.packed = packed
        self.folder, self.files = packed.folder, packed.files

    @cached_property
    def config_changes(self) -> dict[str, tuple[Any, Any]]:  # type: ignore[override]
        """The packed folder's."""
        return self.packed.config_changes

    @cached_property
    def config(self) -> PretrainedConfig:
        """The packed folder's, without its settings."""
        config = copy.deepcopy(self.packed.config)
        forget_quantization(config)
        return config

    @cached_property
    def shards(self) -> ShardReader:
        """Every stored tensor."""
        return self.packed.shards

    @cached_property
    def decoded(self) -> ShardReader:
        """The same, with a weight in the place of the parts of each packed layer."""
        layers = StoredLayers.of(self.packed)
        _check_belong(layers)
        views = dict(_views(layers))
        return ViewedTensors(self.shards, views) if views else self.shards

    @property
    def precision(self) -> dict[str, int]:
        """See `Source.precision`; of a `.gguf` file, what was in it."""
        path = self.folder / _STAMP
        if not path.is_file():
            return super().precision
        types: dict[str, int] = read_object(path, "what a folder was unpacked from")["types"]
        return {kind: n for kind, n in types.items() if kind not in _DENSE_TYPES}

    @property
    def as_stored(self) -> Source:
        """The packed folder, which runs as it is."""
        return self.packed


@dataclass(frozen=True)
class PackedView(View):
    """A parameter of a packed layer. name: in the model. stored: all parts of the layer. packed_as:
    what reports call it."""

    stored: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    name: str
    packed_as: str
    layers: StoredLayers = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        return self.packed_as

    def read(self, slices: Slices) -> Tensor:
        layer, _, suffix = self.name.rpartition(".")
        if suffix == "bias":
            return self.layers.parameter(self.name)
        weight, module = self.layers.weight(layer), self.layers.skeleton.get_submodule(layer)
        if not isinstance(module, torch.nn.Embedding):
            weight = weight_as_stored(module, weight)
        return weight.to(torch.bfloat16).contiguous()


def _views(layers: StoredLayers) -> Iterable[tuple[str, PackedView]]:
    """Views by the names that the tensors would be stored under."""
    fmt, names = layers.format, layers.names
    if fmt is None:
        return
    changes_biases = type(fmt).bias is not Format.bias
    for layer, parts in layers.packed.items():
        stored, kind = tuple(parts.values()), _kind(layers, fmt, layer)
        name = f"{layer}.weight"
        shape = layers.shape(name)
        yield names[name], PackedView(stored, shape, "BF16", name, kind, layers)
        name = f"{layer}.bias"
        if name in names and changes_biases:
            dtype, own = layers.source.shards.dtypes[names[name]], (names[name], *stored)
            yield names[name], PackedView(own, layers.shape(name), dtype, name, kind, layers)


def _kind(layers: StoredLayers, fmt: Format, layer: str) -> str:
    """What reports call a packed layer."""
    spec = fmt.stated_spec(layer, layers.settings)
    return f"{fmt.name} {'floats of few bits' if spec is None else spec}"


def _check_belong(layers: StoredLayers) -> None:
    """Raise `LlmqError` for a part of a packed layer, such as a scale, whose codes are not
    stored."""
    fmt, shards = layers.format, layers.source.shards
    if fmt is None:
        return
    alone = fmt.suffixes - _SHARED
    for name in shards.names:
        layer, _, suffix = name.rpartition(".")
        if suffix in alone and f"{layer}.{fmt.marker}" not in shards.names:
            raise LlmqError(
                f"{shards.names[name]}: tensor {name} is stored without {layer}.{fmt.marker}, "
                f"which it takes to read {fmt.name}; the checkpoint is incomplete: download it "
                "again"
            )
