"""A checkpoint tensor by tensor, whatever its format: packed layers as `QuantizedTensor`, the rest
as it is stored. What is converted or exported is read this way, never the whole model at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.formats.base import Format, Settings
from llmq.formats.save import kept_matrices
from llmq.formats.settings import format_of, quantization_settings
from llmq.grid.spec import ActSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import linear_shape, quantizable_layers
from llmq.models.joined_views import joined_views
from llmq.models.names import check_dtypes, check_shapes, match_names
from llmq.models.outside import Table, tables_of
from llmq.models.shards import ShardReader
from llmq.models.source import Source, meta_model
from llmq.models.stored import StoredModel
from llmq.models.tensors import ViewedTensors
from llmq.recipe import Layer


@dataclass(frozen=True)
class StoredLayers:
    """source: where it lies. tensors: what is stored, as the model wants it where it is not packed.
    skeleton: the model on the meta device. names: of parameters -> those they are stored under; for
    a packed layer, `NAME.weight` -> `STORED.weight`, which is not there. packed: of packed layers,
    `NAME` -> the stored names of their parts by suffix."""

    source: Source
    tensors: ShardReader
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
            return cls(source, source.tensors, model.skeleton, model.names, {}, None, {})
        fmt, skeleton = format_of(settings), meta_model(source.config)
        # No other views: scales are those of packed layers here, experts have layers of their own.
        shards = ViewedTensors(source.shards, joined_views(skeleton, source.shards))
        parts: dict[str, dict[str, str]] = {}
        others = []
        for name in shards.names:
            layer, _, suffix = name.rpartition(".")
            if f"{layer}.{fmt.marker}" in shards.names and suffix != "bias":
                parts.setdefault(layer, {})[suffix] = name
            else:
                others.append(name)
        names = match_names(skeleton, [*others, *(f"{layer}.weight" for layer in parts)])
        of_packed = {f"{layer}.weight" for layer in parts}  # BitNet stores codes under this name
        dense = {name: stored for name, stored in names.items() if stored not in of_packed}
        check_shapes(skeleton, shards, dense)
        check_dtypes(skeleton, shards.dtypes, dense, str(source.folder))
        packed = {
            name.removesuffix(".weight"): parts[stored.removesuffix(".weight")]
            for name, stored in names.items()
            if name not in dense
        }
        return cls(source, shards, skeleton, names, packed, fmt, settings)

    @cached_property
    def activations(self) -> ActSpec:
        """How all packed layers quantize their inputs. Raises `LlmqError` where they differ."""
        if self.format is None:
            return ActSpec()
        names = self.packed.keys() - self.roles.keys()
        found = {self.format.activations_of(name, self.settings) for name in names}
        if len(found) > 1:
            raise LlmqError(
                f"{self.source.folder}: the layers quantize their inputs in {len(found)} ways, "
                "which no other format holds"
            )
        return found.pop() if found else ActSpec()

    @cached_property
    def linear(self) -> dict[str, Layer]:
        """What could be packed: every linear layer of the blocks and, where they are packed,
        embeddings and head. Raises `LlmqError` for a packed layer that is none of these."""
        found = dict(self._in_blocks)
        found |= {table.name: Layer(table.name, table.shape) for table in self._tables}
        if unknown := self.packed.keys() - found.keys():
            raise LlmqError(
                f"{self.source.folder}: packed tensors are stored for {min(unknown)}, which is "
                f"neither a linear layer of the blocks of {type(self.skeleton).__name__} nor its "
                "embeddings or its head; config.json does not belong to these weights"
            )
        return found

    @cached_property
    def roles(self) -> dict[str, str]:
        """Of packed tables outside of the blocks: see `llmq.models.outside.Table`."""
        return {table.name: table.role for table in self._tables}

    @cached_property
    def _in_blocks(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in quantizable_layers(self.skeleton)}

    @cached_property
    def _tables(self) -> list[Table]:
        """Packed matrices outside of the blocks. Models that have none may hold anything there."""
        if not self.packed.keys() - self._in_blocks.keys():
            return []
        return [table for table in tables_of(self.skeleton) if table.name in self.packed]

    @cached_property
    def kept_matrices(self) -> list[str]:
        """See `llmq.formats.save.kept_matrices`."""
        return kept_matrices(self.skeleton)

    @property
    def dense(self) -> Iterator[str]:
        """Parameters that are stored as they are, tied ones once."""
        yield from (name for name in self.names if name.removesuffix(".weight") not in self.packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        state = self.skeleton.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def layer(self, name: str) -> QuantizedTensor:
        """A packed layer, checked. Raises `LlmqError` for a damaged one, and for one that holds
        floats instead of codes."""
        if self.format is None:
            raise KeyError(name)
        tensors, shape = self._parts(name), self.linear[name].shape
        if self.format.dense(name, tensors, self.settings, shape) is not None:
            raise LlmqError(
                f"{self.source.folder}: {name} is stored as floats of few bits, which no other "
                "format of llmq holds; start from the model in full precision"
            )
        qtensor = self.format.read(name, tensors, self.settings, shape)
        qtensor.validate(name)
        return qtensor

    def weight(self, name: str) -> Tensor:
        """float32 `[N, K]` of a packed layer, checked, whatever it is stored as and wherever it
        lies."""
        if self.format is None:
            raise KeyError(name)
        tensors, module = self._parts(name), self.skeleton.get_submodule(name)
        shape, settings = linear_shape(module), self.settings
        if shape is None:
            n, k = self.shape(f"{name}.weight")
            shape, settings = (n, k), self.format.tables.of_embeddings(settings)
        dense = self.format.dense(name, tensors, settings, shape)
        if dense is not None:
            return dense
        qtensor = self.format.read(name, tensors, settings, shape)
        qtensor.validate(name)
        return qtensor.dequantize()

    def bias(self, name: str) -> Tensor | None:
        """What a packed layer adds to its output, or None."""
        return self.parameter(f"{name}.bias") if f"{name}.bias" in self.names else None

    def stored_name(self, name: str) -> str:
        """What the tensors of a packed layer are stored under."""
        return self.names[f"{name}.weight"].removesuffix(".weight")

    @property
    def other_names(self) -> dict[str, str]:
        """Modules -> what they are stored under, where that is another name."""
        stored = {
            name.removesuffix(".weight"): its.removesuffix(".weight")
            for name, its in self.names.items()
            if name.endswith(".weight")
        }
        return {name: its for name, its in stored.items() if name != its}

    def bytes_of(self, name: str) -> int:
        """Stored bytes of a packed layer."""
        return sum(map(self.source.shards.bytes_of, self.packed[name].values()))

    @cached_property
    def others(self) -> list[str]:
        """Stored tensors of everything but packed layers and their biases, also those that the
        model has no place for."""
        packed = {stored for parts in self.packed.values() for stored in parts.values()}
        biases = {self.names.get(f"{name}.bias") for name in self.packed}
        return [name for name in self.source.shards.names if name not in packed | biases]

    @cached_property
    def unused(self) -> list[str]:
        """Stored tensors of packed layers that decide nothing."""
        known = frozenset[str]() if self.format is None else self.format.suffixes
        return sorted(
            stored
            for parts in self.packed.values()
            for suffix, stored in parts.items()
            if suffix not in known
        )

    def parameter(self, name: str) -> Tensor:
        """A parameter that is stored as it is."""
        stored = self.names[name]
        tensor = self.tensors.read([stored])[stored]
        layer, _, suffix = name.rpartition(".")
        if self.format is not None and suffix == "bias" and layer in self.packed:
            return self.format.bias(tensor, self._parts(layer), self.settings)
        return tensor

    def _parts(self, layer: str) -> dict[str, Tensor]:
        stored = self.packed[layer]
        tensors = self.source.shards.read(stored.values())
        return {suffix: tensors[name] for suffix, name in stored.items()}
