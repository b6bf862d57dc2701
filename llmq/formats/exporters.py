"""Every format that a model can be exported into: the folders of the registry, and single files."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import LlmqError
from llmq.formats.registry import NAMES

if TYPE_CHECKING:
    from llmq.formats.changes import ExportReport
    from llmq.models.source import Source

_FILES = {"gguf": "llmq.formats.gguf.export:export_gguf"}
FORMATS = (*NAMES, *_FILES)


def export_as(
    source: Source,
    out: Path,
    format: str,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write a model in one of `FORMATS`, see `llmq.formats.export.export`. A file takes models in
    full precision, too, and is written in one go: `on_part` is not called. Raises `LlmqError`."""
    if format in _FILES:
        if overwrite and out.exists():
            raise LlmqError(f"{out}: --overwrite replaces folders of llmq only; remove the file")
        module, _, name = _FILES[format].partition(":")
        write: Callable[..., ExportReport] = getattr(import_module(module), name)
        return write(source, out, allow_requantize=allow_requantize)
    if format not in FORMATS:
        raise LlmqError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    from llmq.formats.export import export

    return export(
        source,
        out,
        format,
        allow_requantize=allow_requantize,
        overwrite=overwrite,
        on_part=on_part,
    )
