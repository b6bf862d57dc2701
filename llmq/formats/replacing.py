"""A folder again with other values in some of its tensors: every other byte of the weights stays,
and so do names, shards and settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.models.companions import copy_companions
from llmq.models.source import Source
from llmq.storage import files, packing

_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json")


def write_replaced(
    source: Source,
    out_dir: Path,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write the folder of `source` to another place with the stored tensors of these names
    replaced. The folder appears complete or not at all.

    records: JSON files to put beside, by name. Raises `LlmqError` for a tensor that is not stored,
    or stored with another shape or dtype."""
    _check(source, tensors)
    target = files.real_path(out_dir)
    files.check_output(target, overwrite)
    work_dir = target.with_name(f".{target.name}.llmq-replacing")
    files.remove(work_dir)
    made = files.make_folder(work_dir)
    try:
        files.check_space(work_dir, source.weight_bytes)
        copy_companions(source.folder, work_dir, source.weight_names)
        for path in source.weight_paths:
            own = {name: tensors[name] for name in tensors if source.shards.names[name] == path}
            _write_shard(path, work_dir, own)
        for name in {*_SETTINGS, source.shards.start} - set(os.listdir(work_dir)):
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, work_dir / name)
        for name, record in records.items():
            files.write_json(work_dir / name, record)
        files.write_manifest(work_dir)
        files.publish(work_dir, target)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
        files.remove_empty(made)


def _check(source: Source, tensors: Mapping[str, Tensor]) -> None:
    shards = source.shards
    for name, tensor in tensors.items():
        if name not in shards.names:
            raise LlmqError(
                f"{source.folder}: has no tensor {name} to replace; write the model in a format of "
                "llmq first: llmq.save(llmq.load(FOLDER), OUT)"
            )
        if shards.shapes[name] != tuple(tensor.shape):
            raise LlmqError(
                f"{source.folder}: tensor {name} is stored with shape {list(shards.shapes[name])}, "
                f"and what replaces it has {list(tensor.shape)}; write the model in a format of "
                "llmq first: llmq.save(llmq.load(FOLDER), OUT)"
            )


def _write_shard(path: Path, work_dir: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of weights again, its tensors in the same dtypes, a part at a time."""
    real = files.real_path(path)
    stored = packing.stored_tensors(real)
    _, hashes = packing.digests(real)
    if not tensors:
        packing.merge(work_dir / path.name, stored, hashes)
        return
    changed_path = work_dir / f".{path.name}.changed"
    files.write_tensors(changed_path, {name: each.contiguous() for name, each in tensors.items()})
    changed = packing.stored_tensors(changed_path)
    for name, tensor in changed.items():
        if tensor.dtype != stored[name].dtype:
            raise LlmqError(
                f"{path}: tensor {name} is stored as {stored[name].dtype}, and what replaces it is "
                f"{tensor.dtype}; write the model in a format of llmq first: "
                "llmq.save(llmq.load(FOLDER), OUT)"
            )
    _, changed_hashes = packing.digests(changed_path)
    packing.merge(work_dir / path.name, {**stored, **changed}, {**hashes, **changed_hashes})
    files.remove(changed_path)


def as_stored(tensor: Tensor, source: Source, name: str) -> Tensor:
    """A tensor of real numbers in the dtype in which the folder has it."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return tensor.detach().to(dtypes.get(source.shards.dtypes[name], tensor.dtype))
