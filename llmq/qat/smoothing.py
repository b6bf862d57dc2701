"""The model with scale moved inside its blocks (`llmq.ptq.transforms`), which start and student are
made of when the start's method has transforms before it: `--init smoothquant+gptq`.

It computes what the source computes, and the source stays what is learned from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from llmq.formats.load import load
from llmq.models.arch import quantizable_layers
from llmq.models.companions import copy_companions
from llmq.models.compat import only_errors
from llmq.models.readers import CheckpointReader, ModelReader, WeightReader
from llmq.models.source import Source, meta_model
from llmq.ptq.block import TransformedBlock
from llmq.ptq.engine import Task, transform_blocks
from llmq.ptq.methods import split_name
from llmq.ptq.precision import Precision
from llmq.recipe import LayerPlan, Recipe
from llmq.storage import files

FOLDER = "smoothed"
MOVED = "moved.json"  # in the folder


def is_smoothed(recipe: Recipe) -> bool:
    """Whether scale moves before anything is quantized."""
    return bool(split_name(recipe.method)[0])


def smooth(model: PreTrainedModel, recipe: Recipe, tokens: Tensor | None, device: str) -> None:
    """Move scale in a float32 model in memory, in place. tokens: int64 `[n, T]`."""
    skeleton = meta_model(model.config, type(model))
    plans = recipe.plan(quantizable_layers(skeleton))
    for block in _transformed(skeleton, ModelReader(model), recipe, plans, tokens, device):
        _take(model, block)


def write_smoothed(
    source: Source,
    recipe: Recipe,
    plans: list[LayerPlan],
    tokens: Tensor,
    target: Path,
    device: str,
    on_block: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the model to a folder that appears when it is complete. Weights that have changed are
    float32 in it, everything else has the dtypes of the source."""
    model = load(source)
    skeleton = meta_model(source.config)
    reader = CheckpointReader(skeleton, source.tensors, source.files)
    moved: list[dict[str, Any]] = []
    blocks = _transformed(skeleton, reader, recipe, plans, tokens, device, target.parent)
    for index, block in enumerate(blocks):
        _take(model, block)
        moved += [{"block": index, **each} for each in block.moved]
        on_block(index + 1)
    staging = target.with_name(f"{target.name}.unfinished")
    files.remove(staging)
    with only_errors():
        model.save_pretrained(staging)
    copy_companions(source.folder, staging, source.weight_names)
    files.write_json(staging / MOVED, moved)
    files.write_manifest(staging)
    staging.rename(target)


def moved_in(folder: Path) -> list[dict[str, Any]]:
    """What moved in the blocks of a folder, see `Moved.to_json`."""
    found: list[dict[str, Any]] = json.loads((folder / MOVED).read_text())
    return found


def _transformed(
    skeleton: PreTrainedModel,
    reader: WeightReader,
    recipe: Recipe,
    plans: list[LayerPlan],
    tokens: Tensor | None,
    device: str,
    parent: Path | None = None,
) -> Iterator[TransformedBlock]:
    """Block by block. parent: where hidden states lie for that time."""
    names, _ = split_name(recipe.method)
    rounding = Recipe(recipe.rules, method="+".join((*names, "rtn")), seed=recipe.seed)
    precision = Precision.of(skeleton.config, rounding, device)
    task = Task(skeleton, reader, rounding, plans, tokens, device, precision)
    with tempfile.TemporaryDirectory(prefix="llmq-", dir=parent) as work_dir:
        yield from transform_blocks(task, Path(work_dir))


def _take(model: PreTrainedModel, block: TransformedBlock) -> None:
    """Have a model compute with what has changed, in its dtypes."""
    for name, tensor in block.changed.items():
        model.get_parameter(name).data = tensor.to(model.device)
