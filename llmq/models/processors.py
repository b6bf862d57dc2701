"""The processor of a multimodal model: what makes of pictures and text what the model takes."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.building import one_at_a_time
from llmq.models.source import Source
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_object

FILES = ("preprocessor_config.json", "processor_config.json")
MAX_SIDE = 1 << 14  # of pictures as a processor makes them; no published one is near
_REMEDY = "compare its files with those of the original model, or download them again"


@one_at_a_time
def load_processor(source: Source, remedy: str) -> Any:
    """The processor of a folder. remedy: what to do where it has none. Raises `LlmqError` for one
    that is missing, damaged or takes no pictures. Remote code is never run."""
    folder = source.folder
    there = [name for name in FILES if (folder / name).exists()]
    if not there:
        raise LlmqError(
            f"{folder}: has no {FILES[0]}, which says how pictures are read; copy it from the "
            f"original model, or {remedy}"
        )
    for name in there:
        settings = read_object(folder / name, "settings of a processor", _REMEDY)
        _check_sides(settings, f"{folder / name}")
    with (
        reading(folder, "no processor that transformers can read", _REMEDY),
        compat.without_videos(),
        compat.only_errors(),
    ):
        processor = AutoProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    if getattr(processor, "image_processor", None) is None:
        raise LlmqError(
            f"{folder}: its processor ({type(processor).__name__}) takes no pictures; {remedy}"
        )
    return processor


def _check_sides(settings: Any, where: str) -> None:
    """Raise for pictures that would be made too large for any memory."""
    if isinstance(settings, list):
        for each in settings:
            _check_sides(each, where)
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in ("height", "width") and isinstance(value, int | float) and value > MAX_SIDE:
            raise LlmqError(f"{where}: {name} {value}, expected at most {MAX_SIDE}; {_REMEDY}")
        _check_sides(value, where)
