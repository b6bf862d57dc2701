"""A quantized folder in another format, from Python."""

from __future__ import annotations

import os
from pathlib import Path

from llmq.api.models import NAME_FORMS, ModelName, is_name
from llmq.arguments import check_type, refused
from llmq.formats.changes import ExportReport
from llmq.formats.exporters import export_as
from llmq.models.source import Source


def export(
    checkpoint: ModelName,
    out: str | os.PathLike[str],
    format: str,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> ExportReport:
    """Write a quantized folder in another format: the same float32 values bit for bit, or not at
    all.

        report = llmq.export("tiny-w4", "tiny-awq", "awq")
        report.is_exact, report.requantized                # True, []

    format: one of `llmq.formats.exporters.FORMATS`; "gguf" writes a file and takes models in full
    precision, too. allow_requantize: round layers anew that the format cannot hold exactly; the
    report says how far they are. An interrupted export into a folder continues when it is called
    again. Raises `LlmqError` where the format cannot hold the model."""
    if not is_name(checkpoint):
        raise refused("checkpoint", checkpoint, NAME_FORMS)
    check_type("out", out, (str, os.PathLike), "the folder to write")
    check_type("format", format, str, "the name of a format")
    source = Source.open(checkpoint, revision)
    return export_as(
        source, Path(out), format, allow_requantize=allow_requantize, overwrite=overwrite
    )
