"""A model as one GGUF file, tensor by tensor: exactly, or refused with the reason."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmq.errors import LlmqError, LlmqWarning
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


@dataclass
class GgufReport:
    """path, arch: of the file. types: how many tensors there are of each type. exact: how many
    packed layers are stored exactly. rounded: those that are not, with the reason. max_error: the
    largest difference of a weight, 0 where all are exact. notes: what else is to be known."""

    path: str
    arch: str
    source: str = ""
    n_bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    exact: int = 0
    rounded: dict[str, str] = field(default_factory=dict)
    max_error: float = 0.0
    notes: list[str] = field(default_factory=list)

    format = "gguf"

    @property
    def is_exact(self) -> bool:
        """Whether every packed layer has the values that it had."""
        return not self.rounded

    @property
    def n_layers(self) -> int:
        """Packed layers."""
        return self.exact + len(self.rounded)

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": self.path,
            "format": self.format,
            "exact": self.is_exact,
            "stored_bytes": self.n_bytes,
            "n_layers": self.n_layers,
            "n_requantized": len(self.rounded),
            "max_error": self.max_error,
            "requantized": self.rounded,
            "types": self.types,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Planned:
    """A tensor on its way into the file. name: of the parameter, or None for one that the config
    decides. fit: of a packed layer."""

    name: str | None
    entry: Entry
    fit: Fit | None = None


def export_gguf(source: Source, out_path: Path, *, allow_requantize: bool = False) -> GgufReport:
    """Write a model, packed in any format that llmq reads or in full precision, as a GGUF file.

    allow_requantize: store the nearest values where no type of blocks holds a weight exactly.
    Raises `LlmqError` for a family, a tokenizer or a setting that llama.cpp does not have, for a
    weight that cannot be stored exactly, and for an output that exists."""
    if out_path.exists() or out_path.is_symlink():
        raise LlmqError(f"{out_path}: exists already; choose another output, or remove it")
    config = source.config.get_text_config()
    family = family_of_model(config.model_type)
    layers = StoredLayers.of(source)
    fields = _general(source, family) | model_fields(config, family)
    fields |= tokenizer_fields(own_tokenizer(source), int(config.vocab_size))
    plan = _plan(layers, config, family)
    report = GgufReport(str(out_path), family.arch, source.name)
    report.types = dict(Counter(each.entry.type.name for each in plan))
    _judge(layers, plan, report, allow_requantize)
    fields["general.file_type"] = _file_type(plan)
    writer = _Contents(layers, config, family, report)
    entries = [each.entry for each in plan]
    report.n_bytes = write_gguf(out_path, fields, entries, writer.of(plan))
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
    dtype = layers.source.shards.dtypes[layers.names[name]]
    return BY_NAME[dtype if len(shape) > 1 and dtype in DENSE else "F32"]


def _judge(
    layers: StoredLayers, plan: list[_Planned], report: GgufReport, allow_requantize: bool
) -> None:
    """Fill a report with what is known before anything is written, and raise `LlmqError` for what
    is not exact and not allowed."""
    fits = {each.name: each.fit for each in plan if each.name and each.fit}
    report.rounded = {name: each.reason for name, each in fits.items() if each.reason}
    report.exact = len(fits) - len(report.rounded)
    if report.rounded and not allow_requantize:
        name, reason = next(iter(report.rounded.items()))
        raise LlmqError(
            f"GGUF: {len(report.rounded)} of {len(fits)} packed layers cannot be stored exactly, "
            f"the first being {name}: {reason}. {_REMEDY}"
        )
    activations = layers.activations
    if not activations.is_none:
        text = f"the file cannot say that activations are quantized ({activations})"
        if not allow_requantize:
            raise LlmqError(f"GGUF: {text}. --allow-requantize stores the weights alone")
        report.notes.append(f"{text}: the weights are stored alone")
    for name, readers in NOT_BY_ALL.items():
        if name in report.types:
            report.notes.append(f"blocks of type {name} are not read by {readers}")


@dataclass
class _Contents:
    """Reads, packs and hands on, a tensor at a time."""

    layers: StoredLayers
    config: PretrainedConfig
    family: Family
    report: GgufReport

    def of(self, plan: list[_Planned]) -> Iterator[Tensor]:
        """The bytes (uint8) of each tensor of a plan."""
        for each in plan:
            if each.name is None:
                parameters = llama3_parameters(self.config) or {}
                yield rope_factors(parameters, head_dim_of(self.config)).view(torch.uint8)
            elif each.fit is not None:
                yield self._ordered(each.name, self._packed(each.name, each.fit))
            else:
                yield self._dense(each.name, each.entry.type)

    def _packed(self, name: str, chosen: Fit) -> Tensor:
        content, error = encode(self.layers.layer(name.removesuffix(".weight")), chosen)
        if not isfinite(error):
            raise LlmqError(f"GGUF: {name}: its scales are beyond what float16 holds")
        self.report.max_error = max(self.report.max_error, error)
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


def warn_of_notes(report: GgufReport) -> None:
    """Tell what is to be known of a file as warnings."""
    for note in report.notes:
        warnings.warn(f"{report.path}: {note}", LlmqWarning, stacklevel=2)
