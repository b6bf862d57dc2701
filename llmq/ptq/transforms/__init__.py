"""Transforms by name: scale that moves between the parts of a block before its layers are solved. A
transform is one file with a `TRANSFORM` and one line here; `--method smoothquant+gptq` asks for it.

Nothing heavy is imported: the command line reads this for `--help`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.ptq.transforms.base import Transform

TRANSFORMS = {
    "smoothquant": "scale moves from activations into weights; for activations of static ranges",
}


def transform_named(name: str) -> Transform:
    """The transform of a name in `TRANSFORMS`."""
    transform: Transform = import_module(f"{__name__}.{name}").TRANSFORM
    return transform
