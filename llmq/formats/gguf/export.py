"""A model as one GGUF file, tensor by tensor: exactly, or refused with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmq.errors import LlmqError
from llmq.formats.changes import ExportReport, LayerChange
from llmq.formats.engine_rules import Result
from llmq.formats.engines import readings
from llmq.formats.exported import card_of, card_path, check_file
from llmq.formats.gguf.families import (
    ROPE_FACTORS,
    Family,
    family_of_model,
    permuted,
    rope_factors,
)
from llmq.formats.gguf.fit import Fit, encode, fit
from llmq.formats.gguf.metadata import (
    head_dim_of,
    kv_heads_of,
    llama3_parameters,
    model_fields,
)
from llmq.formats.gguf.tensor_types import BY_NAME, DENSE, GgmlType
from llmq.formats.gguf.vocabulary import tokenizer_fields
from llmq.formats.gguf.writer import Entry, Value, write_gguf
from llmq.formats.layers import StoredLayers
from llmq.grid.spec import QuantSpec
from llmq.models.source import Source
from llmq.models.tokens import own_tokenizer

# llama.cpp's number of a file by the type that most of its weights have.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "BF16": 32,
    "TQ2_0": 37,
    "Q2_0": 41,
}
_BLOCKS_VERSION = 2
_REMEDY = "--allow-requantize stores the nearest values and says how far they are"
NOT_BY_ALL = {"Q2_0": "gguf 0.19, transformers and llama.cpp of before 2026"}


@dataclass(frozen=True)
class _Planned:
    """A tensor on its way into the file. name: of the parameter, or None for one that the config
    decides. fit: of a packed layer."""

    name: str | None
    entry: Entry
    fit: Fit | None = None

    @property
    def layer(self) -> str:
        """Of a packed layer, as a module."""
        return (self.name or "").removesuffix(".weight")


def export_gguf(source: Source, out_path: Path, *, allow_requantize: bool = False) -> ExportReport:
    """Write a model, packed in any format that llmq reads or in full precision, as a GGUF file.

    allow_requantize: store the nearest values where no type of blocks holds a weight exactly.
    Raises `LlmqError` for a family, a tokenizer or a setting that llama.cpp does not have, for a
    weight that cannot be stored exactly, and for an output that exists."""
    check_file(out_path)
    config = source.config.get_text_config()
    family = family_of_model(config.model_type)
    layers = StoredLayers.of(source)
    fields = _general(source, family) | model_fields(config, family)
    fields |= tokenizer_fields(own_tokenizer(source), int(config.vocab_size))
    plan = _plan(layers, config, family)
    notes = _judged(layers, plan, allow_requantize)
    fields["general.file_type"] = _file_type(plan)
    writer = _Contents(layers, config, family)
    entries = [each.entry for each in plan]
    n_bytes = write_gguf(out_path, fields, entries, writer.of(plan))
    report = ExportReport(
        source=source.name,
        out=str(out_path),
        card=str(card_path(out_path)),
        source_format="" if layers.format is None else layers.format.name,
        format="gguf",
        source_bytes=source.weight_bytes,
        stored_bytes=n_bytes,
        layers=tuple(writer.changes),
        types=dict(Counter(entry.type.name for entry in entries)),
        engines=tuple(readings(Result("gguf", writer.specs))),
        left_out=tuple(layers.unused),
        notes=(f"the file is of llama.cpp's family {family.arch}", *notes),
    )
    text = card_of(layers, report, out_path.name)
    card_path(out_path).write_text(text, encoding="utf-8")
    return report


def _general(source: Source, family: Family) -> dict[str, Value]:
    return {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": source.name,
        "general.quantization_version": _BLOCKS_VERSION,
    }


def _file_type(plan: list[_Planned]) -> int:
    sizes: Counter[str] = Counter()
    for each in plan:
        sizes[each.entry.type.name] += each.entry.n_bytes
    packed = [name for name, _ in sizes.most_common() if name not in DENSE]
    most = packed[0] if packed else sizes.most_common(1)[0][0]
    return _FILE_TYPES[most]


def _plan(layers: StoredLayers, config: PretrainedConfig, family: Family) -> list[_Planned]:
    """Every tensor of the file, embeddings first, then the blocks in their order."""
    plan = []
    if parameters := llama3_parameters(config):
        factors = rope_factors(parameters, head_dim_of(config))
        plan.append(_Planned(None, Entry(ROPE_FACTORS, tuple(factors.shape), BY_NAME["F32"])))
    for name in layers.names:
        shape = layers.shape(name)
        layer = name.removesuffix(".weight")
        chosen = fit(layers.layer(layer)) if layer in layers.packed else None
        kind = chosen.type if chosen else _dense_type(layers, name, shape)
        plan.append(_Planned(name, Entry(family.gguf_name(name), shape, kind), chosen))
    return plan


def _dense_type(layers: StoredLayers, name: str, shape: tuple[int, ...]) -> GgmlType:
    """Of a tensor in full precision: matrices as they are stored, the rest in float32."""
    dtype = layers.tensors.dtypes[layers.names[name]]
    return BY_NAME[dtype if len(shape) > 1 and dtype in DENSE else "F32"]


def _judged(layers: StoredLayers, plan: list[_Planned], allow_requantize: bool) -> list[str]:
    """What is to be known of a file that is not written yet. Raises `LlmqError` for what is not
    exact and not allowed."""
    fits = {each.layer: each.fit for each in plan if each.fit}
    rounded = {name: each.reason for name, each in fits.items() if each.reason}
    if rounded and not allow_requantize:
        name, reason = next(iter(rounded.items()))
        raise LlmqError(
            f"GGUF: {len(rounded)} of {len(fits)} packed layers cannot be stored exactly, "
            f"the first being {name}: {reason}. {_REMEDY}"
        )
    notes = []
    activations = layers.activations
    if not activations.is_none:
        text = f"the file cannot say that activations are quantized ({activations})"
        if not allow_requantize:
            raise LlmqError(f"GGUF: {text}. --allow-requantize stores the weights alone")
        notes.append(f"{text}: the weights are stored alone")
    types = {each.entry.type.name for each in plan}
    for name, readers in NOT_BY_ALL.items():
        if name in types:
            notes.append(f"blocks of type {name} are not read by {readers}")
    return notes


@dataclass
class _Contents:
    """Reads, packs and hands on, a tensor at a time. changes, specs: of packed layers."""

    layers: StoredLayers
    config: PretrainedConfig
    family: Family
    changes: list[LayerChange] = field(default_factory=list)
    specs: dict[str, QuantSpec] = field(default_factory=dict)

    def of(self, plan: list[_Planned]) -> Iterator[Tensor]:
        """The bytes (uint8) of each tensor of a plan."""
        for each in plan:
            if each.name is None:
                parameters = llama3_parameters(self.config) or {}
                yield rope_factors(parameters, head_dim_of(self.config)).view(torch.uint8)
            elif each.fit is not None:
                yield self._ordered(each.name, self._packed(each.layer, each.fit))
            else:
                yield self._dense(each.name, each.entry.type)

    def _packed(self, name: str, chosen: Fit) -> Tensor:
        qtensor = self.layers.layer(name)
        content, distance = encode(qtensor, chosen)
        if not isfinite(distance.largest):
            raise LlmqError(f"GGUF: {name}: its scales are beyond what float16 holds")
        self.specs[name] = qtensor.spec
        self.changes.append(
            LayerChange(
                name,
                str(qtensor.spec),
                chosen.type.name,
                chosen.reason is None,
                distance.relative,
                distance.largest,
                chosen.reason or "",
            )
        )
        return content

    def _dense(self, name: str, kind: GgmlType) -> Tensor:
        tensor = self.layers.parameter(name)
        if self.family.is_norm(name):
            tensor = tensor.float() + self.family.norm_offset
        tensor = tensor.to(DENSE[kind.name])
        content = tensor.contiguous().view(tensor.shape[0], -1).view(torch.uint8)
        return self._ordered(name, content)

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows in llama.cpp's order, packed or not."""
        heads = self.family.permuted_heads(
            name, self.config.num_attention_heads, kv_heads_of(self.config)
        )
        return rows if heads is None else permuted(rows, heads)
