"""Where the blocks of a run go, and how they come back."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from llmq.formats.base import Format
from llmq.formats.save import checkpoint_config, layer_tensors
from llmq.grid.spec import ActSpec
from llmq.inference.module import swap
from llmq.models.readers import CheckpointReader
from llmq.ptq.results import BlockReport, BlockResult, StoredBlock
from llmq.ptq.verify import check_same
from llmq.recipe import LayerPlan, Recipe
from llmq.storage.partial_checkpoint import PartialCheckpoint


class FolderSink:
    """Stores blocks as files and reads them back."""

    def __init__(
        self,
        partial: PartialCheckpoint,
        reader: CheckpointReader,
        fmt: Format,
        plans: list[LayerPlan],
        recipe: Recipe,
    ) -> None:
        self.partial, self.reader, self.fmt, self.plans = partial, reader, fmt, plans
        self.config = checkpoint_config(
            fmt, plans, act_order=recipe.order == "act", activations=recipe.activations
        )

    def store(self, result: BlockResult) -> StoredBlock:
        return self._write(result.report.index, StoredBlock(result.quantized, result.kept))

    def _write(self, index: int, block: StoredBlock) -> StoredBlock:
        packed = {
            name: layer_tensors(name, qtensor, self.fmt)
            for name, qtensor in block.quantized.items()
        }
        tensors = dict(block.kept)
        for parts in packed.values():
            tensors.update(parts)
        written = self.partial.write_block(index, self.reader.stored_names(tensors))
        read_back = {}
        for name, parts in packed.items():
            stored = {
                full.rpartition(".")[2]: written[next(iter(self.reader.stored_names({full: part})))]
                for full, part in parts.items()
            }
            read_back[name] = self.fmt.read(name, stored, self.config, block.quantized[name].shape)
            read_back[name].validate(name)
        there = self.reader.from_stored(written)
        return StoredBlock(read_back, {name: there[name] for name in block.kept})

    def replace_block(self, index: int, block: StoredBlock, about: dict[str, Any]) -> None:
        """Store another version of a finished block. about: joins its report. Raises
        `VerificationError` when it reads back otherwise."""
        read_back = self._write(index, block)
        check_same(self.partial.block_path(index).name, block, read_back)
        self.partial.finish_again(index, about)

    def read_block(self, index: int) -> StoredBlock:
        """What is stored of a finished block, from its file alone."""
        tensors = self.partial.read_block(index)
        quantized = {}
        for plan in self.plans:
            name = plan.layer.name
            weight = self.reader.names[f"{name}.weight"]
            layer = weight.removesuffix("weight")
            if plan.spec is None or not any(key.startswith(layer) for key in tensors):
                continue
            own = {key for key in tensors if key.startswith(layer)}
            kept = (own & set(self.reader.names.values())) - {weight}  # its bias
            parts = {key.removeprefix(layer): tensors.pop(key) for key in own - kept}
            quantized[name] = self.fmt.read(name, parts, self.config, plan.layer.shape)
            quantized[name].validate(name)
        return StoredBlock(quantized, self.reader.from_stored(tensors))

    def forget_after(self, index: int) -> None:
        self.partial.forget_after(index)

    def seal(self, report: BlockReport) -> None:
        self.partial.finish_block(report.index, report.to_json(), self.reader.take_read())


class ModelSink:
    """Puts what became of a block into a model in memory once it is verified, each layer on the
    device of the one that it replaces."""

    def __init__(self, model: PreTrainedModel, activations: ActSpec) -> None:
        self.model, self.activations = model, activations
        self.pending = StoredBlock({}, {})
        self.reports: list[BlockReport] = []

    def store(self, result: BlockResult) -> StoredBlock:
        self.pending = StoredBlock(result.quantized, result.kept)
        return self.pending

    @torch.no_grad()
    def seal(self, report: BlockReport) -> None:
        state = self.model.state_dict()
        for name, tensor in self.pending.kept.items():
            state[name].copy_(tensor)
        swap(
            self.model,
            {
                name: qtensor.to(state[f"{name}.weight"].device)
                for name, qtensor in self.pending.quantized.items()
            },
            self.activations,
        )
        self.pending = StoredBlock({}, {})
        self.reports.append(report)
