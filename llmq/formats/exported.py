"""What the report and the card of an exported model say: how the model was made, as far as its
folder knows, and what the export made of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from llmq.cards.base import base_of
from llmq.cards.facts import GGUF
from llmq.cards.head import is_of_llmq
from llmq.cards.page import card
from llmq.cards.versions import versions
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.changes import ExportReport
from llmq.formats.layers import StoredLayers
from llmq.models.source import Source
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_object

REPORT = "report.json"
_WHAT = "a report of llmq"


def made_and_exported(source: Source, report: ExportReport) -> dict[str, Any] | None:
    """The report that lies in the folder of the source, with what the export made of it; None where
    there is none."""
    path = source.folder / REPORT
    if not path.is_file():
        return None
    made = read_object(path, _WHAT)
    exported = {**report.to_json(), "out": "", "card": "", "source": source.name}
    engines = exported.pop("engines")
    if isinstance(bits := made.get("bits_per_weight"), float) and made.get("stored_bytes"):
        made["bits_per_weight"] = round(bits * report.stored_bytes / made["stored_bytes"], 4)
    made |= {"format": report.format, "stored_bytes": report.stored_bytes}
    return made | {"engines": engines, "exported": exported}


def card_of(layers: StoredLayers, report: ExportReport, name: str) -> str:
    """The card of an exported model. name: of the folder or file. Warns of a report in the folder
    of the source that is none of llmq's, which the card does without."""
    source = layers.source
    base = base_of(source.folder)
    try:
        with reading(source.folder / REPORT, f"not {_WHAT}", "the card does without it"):
            if made := made_and_exported(source, report):
                return card({**made, **_renewed(made, layers, report)}, base, name)
    except LlmqError as error:
        warnings.warn(str(error), LlmqWarning, stacklevel=2)
    return card(_facts(layers, report), base, name)


def _renewed(made: dict[str, Any], layers: StoredLayers, report: ExportReport) -> dict[str, Any]:
    """Keys of a report that are others after an export."""
    kept = [layer for layer in made["layers"] if layer["spec"] is None]
    return {
        "layers": [*_layers(layers, report), *kept],
        "bits_per_quantized_weight": None,  # those of the source's format
    }


def _facts(layers: StoredLayers, report: ExportReport) -> dict[str, Any]:
    """Those keys of a report that an export knows by itself."""
    quantized = _layers(layers, report)
    names = {layer["name"] for layer in quantized}
    linear = [name for name in layers.linear if name not in layers.roles]
    facts: dict[str, Any] = {
        "format": report.format,
        "layers": quantized,
        "kept_layers": [name for name in linear if name not in names],
        "activations": layers.activations.to_json(),
        "stored_bytes": report.stored_bytes,
        "engines": [reading.to_json() for reading in report.engines],
        "exported": report.to_json(),
        "versions": versions(),
    }
    return facts if layers.packed else {**facts, "source_bytes": report.source_bytes}


def _layers(layers: StoredLayers, report: ExportReport) -> list[dict[str, Any]]:
    """Quantized layers of the blocks. What a GGUF file calls blocks is no spec: there it is that of
    the values."""
    is_file = report.format == GGUF
    return [
        {"name": each.name, "spec": each.before if is_file else each.after}
        for each in report.layers
        if each.name not in layers.roles
    ]


def card_path(out: Path) -> Path:
    """Where the card of a file lies: beside it."""
    return out.with_name(f"{out.name}.md")


def check_file(out: Path) -> None:
    """Raise `LlmqError` where a file, or something that is no card of llmq beside it, is there."""
    card = card_path(out)
    is_ours = card.is_file() and not card.is_symlink() and is_of_llmq(card)
    for path in (out, card):
        is_there = path.exists() or path.is_symlink()
        if is_there and not (path == card and is_ours):
            raise LlmqError(f"{path}: exists already; choose another output, or remove it")
