"""A checkpoint tensor by tensor, whatever its format: packed layers as `QuantizedTensor`, the rest
as it is stored. What is converted or exported is read this way, never the whole model at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from llmq.formats.base import Format, Settings
from llmq.formats.settings import format_of, quantization_settings
from llmq.grid.spec import ActSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.names import check_dtypes, check_shapes, match_names
from llmq.models.source import Source, meta_model
from llmq.models.stored import StoredModel


@dataclass(frozen=True)
class StoredLayers:
    """source: where it lies. skeleton: the model on the meta device. names: of parameters -> those
    they are stored under; for a packed layer, `NAME.weight` -> `STORED.weight`, which is not there.
    packed: of packed layers, `NAME` -> the stored names of their parts by suffix."""

    source: Source
    skeleton: PreTrainedModel
    names: dict[str, str]
    packed: dict[str, dict[str, str]]
    format: Format | None
    settings: Settings

    @classmethod
    def of(cls, source: Source) -> StoredLayers:
        """Raises `LlmqError` for what is missing, of another shape or no weight."""
        settings = quantization_settings(copy.deepcopy(source.config))
        if settings is None:
            model = StoredModel.of(source)
            model.check()
            return cls(source, model.skeleton, model.names, {}, None, {})
        fmt, skeleton, shards = format_of(settings), meta_model(source.config), source.shards
        parts: dict[str, dict[str, str]] = {}
        others = []
        for name in shards.names:
            layer, _, suffix = name.rpartition(".")
            if f"{layer}.{fmt.marker}" in shards.names and suffix != "bias":
                parts.setdefault(layer, {})[suffix] = name
            else:
                others.append(name)
        names = match_names(skeleton, [*others, *(f"{layer}.weight" for layer in parts)])
        dense = {name: stored for name, stored in names.items() if stored in shards.names}
        check_shapes(skeleton, shards, dense)
        check_dtypes(skeleton, shards.dtypes, dense, str(source.folder))
        packed = {
            name.removesuffix(".weight"): parts[stored.removesuffix(".weight")]
            for name, stored in names.items()
            if name not in dense
        }
        return cls(source, skeleton, names, packed, fmt, settings)

    @property
    def activations(self) -> ActSpec:
        """How the inputs of packed layers are quantized."""
        return ActSpec.from_json(self.settings.get("activations") or {})

    @property
    def dense(self) -> Iterator[str]:
        """Parameters that are stored as they are, tied ones once."""
        yield from (name for name in self.names if name.removesuffix(".weight") not in self.packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return tuple(self.skeleton.state_dict()[name].shape)

    def layer(self, name: str) -> QuantizedTensor:
        """A packed layer, checked. Raises `LlmqError` for a damaged one."""
        if self.format is None:
            raise KeyError(name)
        n, k = self.shape(f"{name}.weight")
        tensors = self._parts(name)
        qtensor = self.format.read(name, tensors, self.settings, (n, k))
        qtensor.validate(name)
        return qtensor

    def parameter(self, name: str) -> Tensor:
        """A parameter that is stored as it is."""
        stored = self.names[name]
        tensor = self.source.shards.read([stored])[stored]
        layer, _, suffix = name.rpartition(".")
        if self.format is not None and suffix == "bias" and layer in self.packed:
            return self.format.bias(tensor, self._parts(layer), self.settings)
        return tensor

    def _parts(self, layer: str) -> dict[str, Tensor]:
        stored = self.packed[layer]
        tensors = self.source.shards.read(stored.values())
        return {suffix: tensors[name] for suffix, name in stored.items()}
