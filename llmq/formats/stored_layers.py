"""The layers of a quantized folder, read one at a time: without a model that holds them all."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from llmq.errors import LlmqError
from llmq.formats.save import kept_matrices
from llmq.formats.settings import format_of, quantization_settings
from llmq.grid.spec import ActSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import quantizable_layers
from llmq.models.names import stored_to_model_names
from llmq.models.outside import tables_of
from llmq.models.source import Source, meta_model
from llmq.recipe import Layer


class StoredLayers:
    """source: a quantized folder. format: its format. settings: its `quantization_config`, checked.

    Raises `LlmqError` for a folder that is not quantized, or whose packed layers are not those of
    the model in its config."""

    def __init__(self, source: Source) -> None:
        settings = quantization_settings(source.config)
        if settings is None:
            raise LlmqError(
                f"{source.folder}: is not quantized; 'llmq quantize' makes a quantized folder of it"
            )
        self.source, self.settings, self.format = source, settings, format_of(settings)
        shards, marker = source.shards, f".{self.format.marker}"
        stored = [name.removesuffix(marker) for name in shards.names if name.endswith(marker)]
        skeleton = meta_model(source.config)
        names = stored_to_model_names(skeleton, [f"{name}.weight" for name in stored])
        # module -> the name that its tensors are stored under
        self._stored = {names[f"{name}.weight"].removesuffix(".weight"): name for name in stored}
        self.linear = {layer.name: layer for layer in quantizable_layers(skeleton)}
        # of what lies outside of the blocks: name -> see `llmq.models.outside.Table`
        self.roles: dict[str, str] = {}
        if self._stored.keys() - self.linear.keys():
            tables = [table for table in tables_of(skeleton) if table.name in self._stored]
            self.roles = {table.name: table.role for table in tables}
            self.linear |= {table.name: Layer(table.name, table.shape) for table in tables}
        self.kept_matrices = kept_matrices(skeleton)
        if unknown := self._stored.keys() - self.linear.keys():
            raise LlmqError(
                f"{source.folder}: packed tensors are stored for {min(unknown)}, which is "
                f"neither a linear layer of the blocks of {type(skeleton).__name__} nor its "
                "embeddings or its head; config.json does not belong to these weights"
            )

    @cached_property
    def activations(self) -> ActSpec:
        """How all of them quantize their inputs. Raises `LlmqError` where they differ."""
        names = self._stored.keys() - self.roles.keys()
        found = {self.format.activations_of(name, self.settings) for name in names}
        if len(found) > 1:
            raise LlmqError(
                f"{self.source.folder}: the layers quantize their inputs in {len(found)} ways, "
                "which no other format holds"
            )
        return found.pop() if found else ActSpec()

    @property
    def names(self) -> list[str]:
        """The quantized layers, in the order of the model."""
        return [name for name in self.linear if name in self._stored]

    def layer(self, name: str) -> Layer:
        """Name and shape of a linear layer, quantized or not."""
        return self.linear[name]

    def stored_name(self, name: str) -> str:
        """What the tensors of a layer are stored under."""
        return self._stored[name]

    def bytes_of(self, name: str) -> int:
        """Stored bytes of a quantized layer."""
        return sum(map(self.source.shards.bytes_of, self._suffixes[self._stored[name]]))

    def read(self, name: str) -> QuantizedTensor:
        """A layer, checked. Raises `LlmqError` for anything damaged, and for numbers that are no
        codes."""
        tensors, shape = self._tensors_of(name), self.linear[name].shape
        tensors.pop("bias", None)
        if self.format.dense(name, tensors, self.settings, shape) is not None:
            raise LlmqError(
                f"{self.source.folder}: {name} is stored as floats of few bits, which no other "
                "format of llmq holds; start from the model in full precision"
            )
        qtensor = self.format.read(name, tensors, self.settings, shape)
        qtensor.validate(name)
        return qtensor

    def bias(self, name: str) -> Tensor | None:
        """What a layer adds to its output, in its stored dtype."""
        tensors = self._tensors_of(name)
        bias = tensors.pop("bias", None)
        return None if bias is None else self.format.bias(bias, tensors, self.settings)

    def _tensors_of(self, name: str) -> dict[str, Tensor]:
        stored = self._stored[name]
        found = self.source.shards.read(self._suffixes[stored])
        return {full.rpartition(".")[2]: tensor for full, tensor in found.items()}

    @cached_property
    def _suffixes(self) -> dict[str, list[str]]:
        """The stored tensors of each packed layer."""
        packed: dict[str, list[str]] = {name: [] for name in self._stored.values()}
        for full in self.source.shards.names:
            layer = full.rpartition(".")[0]
            if layer in packed:
                packed[layer].append(full)
        return packed

    @cached_property
    def others(self) -> list[str]:
        """Stored tensors of everything else."""
        packed = {full for names in self._suffixes.values() for full in names}
        return [name for name in self.source.shards.names if name not in packed]

    @cached_property
    def unused(self) -> list[str]:
        """Stored tensors of packed layers that decide nothing."""
        used = self.format.suffixes | {"bias"}
        packed = (full for names in self._suffixes.values() for full in names)
        return sorted(full for full in packed if full.rpartition(".")[2] not in used)
