"""The processor of a multimodal model: what makes of pictures and text what the model takes."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.building import one_at_a_time
from llmq.models.source import Source
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_object

FILES = ("preprocessor_config.json", "processor_config.json")
MAX_SIDE = 1 << 14  # of pictures as a processor makes them; no published one is near
MAX_PIXELS = 1 << 20  # where pixels are bounded instead: 1338 tokens of 28 x 28
_LEAST = ("shortest_edge", "min_pixels")  # what small pictures are made as large as
_MOST = ("longest_edge", "max_pixels")
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
    _bound_pixels(processor.image_processor)
    return processor


def _bound_pixels(image_processor: Any) -> None:
    """Have pictures made no larger than `MAX_PIXELS` where the processor bounds their pixels
    (Qwen2-VL, which calls that the longest edge): by its own settings a large picture may be 16384
    tokens."""
    size = getattr(image_processor, "size", None)
    if not size:
        return
    stated = dict(size)
    too_large = [name for name in _MOST if (stated.get(name) or 0) > MAX_PIXELS]
    if too_large:
        image_processor.size = size | dict.fromkeys(too_large, MAX_PIXELS)
    if (getattr(image_processor, "max_pixels", None) or 0) > MAX_PIXELS:
        image_processor.max_pixels = MAX_PIXELS


def refusal_of_pictures(model: PreTrainedModel) -> str | None:
    """Why a model cannot be calibrated with pictures, or None where nothing is known against it.
    Some add what they see to the hidden states between blocks, too (Qwen3-VL's deepstack)."""
    key = _deepstack(model.config.to_dict())
    return key and (
        f"{type(model).__name__}, with pictures: it adds what it sees to the hidden states between "
        f"blocks ({key}), so its blocks cannot be run one by one; calibrate on the text alone: "
        "FILE#COLUMN"
    )


def _deepstack(config: dict[Any, Any]) -> str | None:
    """The key of a config, or of that of a part, that says so."""
    for key, value in config.items():
        if isinstance(key, str) and key.startswith("deepstack") and value:
            return key
        if isinstance(value, dict) and (found := _deepstack(value)):
            return found
    return None


def _check_sides(settings: Any, where: str) -> None:
    """Raise for pictures that would be made too large for any memory."""
    if isinstance(settings, list):
        for each in settings:
            _check_sides(each, where)
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if name in ("height", "width") and isinstance(value, int | float) and value > MAX_SIDE:
            raise LlmqError(f"{where}: {name} {value}, expected at most {MAX_SIDE}; {_REMEDY}")
        if name in _LEAST and isinstance(value, int | float) and value > MAX_PIXELS:
            raise LlmqError(f"{where}: {name} {value}, expected at most {MAX_PIXELS}; {_REMEDY}")
        _check_sides(value, where)
