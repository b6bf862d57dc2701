"""`llmq export`: a quantized folder in another format, layer by layer.

Memory holds one part of the folder at a time, never the model; a run that is killed continues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import llmq
from llmq.cards.head import CARD
from llmq.errors import LlmqError, VerificationError
from llmq.formats.base import Format, Settings
from llmq.formats.changes import ExportReport, LayerChange
from llmq.formats.conversion import Conversion, convert, plan_conversion
from llmq.formats.engine_rules import Result
from llmq.formats.engines import readings
from llmq.formats.exported import REPORT, card_of, made_and_exported
from llmq.formats.layers import StoredLayers
from llmq.formats.registry import known_format, result_of
from llmq.formats.save import checkpoint_config, layer_tensors, write_configs
from llmq.grid.tensor import QuantizedTensor
from llmq.models.companions import copy_companions
from llmq.models.identity import hub_id
from llmq.models.source import Source
from llmq.storage import files
from llmq.storage.attempt import kept_for_later
from llmq.storage.packing import StoredTensor, group_by_size
from llmq.storage.partial_checkpoint import PartialCheckpoint
from llmq.storage.workspace import check_output

PART_BYTES = 512 << 20  # of the source, that are held in memory at a time


def export(
    source: Source,
    out_dir: Path,
    format: str,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write a quantized folder in another of `llmq.formats.registry.NAMES`.

    allow_requantize: round layers anew that the format cannot hold exactly. on_part: told how many
    parts are written, of how many. Raises `LlmqError` where the format cannot hold the model, and
    before anything is written."""
    fmt = known_format(format)
    check_output(out_dir, overwrite)
    layers = StoredLayers.of(source)
    if layers.format is None:
        raise LlmqError(
            f"{source.folder}: is not quantized; 'llmq quantize' makes a quantized folder of it"
        )
    conversion = plan_conversion(layers, fmt, allow_requantize=allow_requantize)
    parts = _parts(layers)
    partial = PartialCheckpoint(out_dir, _identity(source, format), len(parts) - 1)
    with kept_for_later(partial):
        changes = _write_parts(layers, conversion, partial, parts, on_part)
        return _publish(layers, conversion, partial, changes, out_dir)


def _identity(source: Source, format: str) -> dict[str, Any]:
    """What decides the bytes of the result."""
    return {
        "export": {
            "folder": str(files.real_path(source.folder)),
            "size and time of": files.stamps(set(source.shards.names.values())),
            "contents of": source.files.contents(),
        },
        "format": format,
        "llmq": llmq.__version__,
    }


@dataclass(frozen=True)
class _Part:
    """layers: by name. others: stored tensors that are copied as they are."""

    layers: list[str]
    others: list[str]


def _parts(layers: StoredLayers) -> list[_Part]:
    """What is read and written at a time."""
    shards = layers.source.shards
    names = list(layers.packed)
    sizes = [layers.bytes_of(name) for name in names]
    groups = group_by_size(sizes, PART_BYTES)
    packed = [_Part([names[i] for i in group], []) for group in groups]
    other_sizes = [shards.bytes_of(name) for name in layers.others]
    others = group_by_size(other_sizes, PART_BYTES)
    return packed + [_Part([], [layers.others[i] for i in group]) for group in others]


def _write_parts(
    layers: StoredLayers,
    conversion: Conversion,
    partial: PartialCheckpoint,
    parts: list[_Part],
    on_part: Callable[[int, int], None],
) -> list[LayerChange]:
    """Write what is not written yet. Returns what became of every layer."""
    changes: list[LayerChange] = []
    for index, part in enumerate(parts):
        on_part(index, len(parts))
        if not partial.is_finished(index):
            tensors, changed = _converted(layers, conversion, part)
            for _ in partial.written(index, tensors):
                pass
            layers.source.files.check(set(layers.source.shards.names.values()))
            record = {"layers": [change.to_json() for change in changed]}
            partial.finish_block(index, record)
        report = partial.report_of(index) or {}
        changes += [LayerChange(**each) for each in report.get("layers", ())]
    on_part(len(parts), len(parts))
    return changes


def _converted(
    layers: StoredLayers, conversion: Conversion, part: _Part
) -> tuple[dict[str, Tensor], list[LayerChange]]:
    tensors = dict(layers.source.shards.read(part.others))
    changes = []
    settings = conversion.format.read_config(_config(layers, conversion))
    for name in part.layers:
        role = layers.roles.get(name, "")
        qtensor, change = convert(name, layers.layer(name), conversion, role)
        stored = layers.stored_name(name)
        fmt = conversion.format
        own = layer_tensors(stored, qtensor, fmt.for_role(role))
        _check(name, qtensor, own, conversion.format, settings)
        if (bias := layers.bias(name)) is not None:
            own[f"{stored}.bias"] = bias
        tensors |= own
        changes.append(change)
    return tensors, changes


def _check(
    name: str,
    qtensor: QuantizedTensor,
    tensors: dict[str, Tensor],
    fmt: Format,
    settings: Settings,
) -> None:
    """Raise `VerificationError` where the format would read another weight than it was given."""
    suffixes = {full.rpartition(".")[2]: tensor for full, tensor in tensors.items()}
    back = fmt.read(name, suffixes, settings, qtensor.shape)
    if not bool((back.dequantize() == qtensor.dequantize()).all()):
        raise VerificationError(
            f"{name}: the {fmt.name} format does not give back the weight that it was given; "
            "report this as a fault of llmq"
        )


def _config(layers: StoredLayers, conversion: Conversion) -> dict[str, Any]:
    return checkpoint_config(
        conversion.format,
        conversion.plans,
        act_order=conversion.has_order,
        activations=layers.activations,
        kept=layers.kept_matrices,
        stored=layers.other_names,
    )


def _result(layers: StoredLayers, conversion: Conversion) -> Result:
    """What is asked of other engines."""
    return result_of(
        conversion.format,
        conversion.plans,
        layers.activations,
        act_order=conversion.has_order,
        stored={plan.layer.name: layers.stored_name(plan.layer.name) for plan in conversion.plans},
    )


def _publish(
    layers: StoredLayers,
    conversion: Conversion,
    partial: PartialCheckpoint,
    changes: list[LayerChange],
    out_dir: Path,
) -> ExportReport:
    source, target = layers.source, partial.checkpoint_dir
    partial.keep_only_blocks()
    shards = partial.pack()
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensors in shards.values() for tensor in tensors.values())
        files.write_index(target, shards, total)
    companions = copy_companions(source.folder, target, source.weight_names)
    source.files.check()
    write_configs(
        target,
        source.config,
        _config(layers, conversion),
        name=hub_id(source.folder),
        companions=companions,
    )
    name = files.real_path(out_dir).name
    report = ExportReport(
        source=source.name,
        out=str(out_dir),
        card=str(out_dir / CARD),
        source_format="" if layers.format is None else layers.format.name,
        format=conversion.format.name,
        source_bytes=source.weight_bytes,
        stored_bytes=sum((target / name).stat().st_size for name in shards),
        layers=tuple(changes),
        types=_types(shards),
        engines=tuple(readings(_result(layers, conversion))),
        left_out=tuple(layers.unused),
    )
    if made := made_and_exported(source, report):
        files.write_json(target / REPORT, made)
    (target / CARD).write_text(card_of(layers, report, name), encoding="utf-8")
    partial.publish()
    return report


def _types(shards: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, int]:
    """How many tensors there are of each dtype, by file."""
    stored = (tensor for tensors in shards.values() for tensor in tensors.values())
    return dict(Counter(tensor.dtype for tensor in stored))
