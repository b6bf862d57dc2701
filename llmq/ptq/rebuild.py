"""Inputs of blocks that have to be solved again.

The inputs of a block are given up when it is finished. Where a finished block or the inputs of the
next turn out to be damaged, they are computed again by running the blocks before, which are there:
the quantized stream through the weights that were stored, the full-precision stream through those
of the source. Running is cheap beside solving, and gives the same bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from llmq.errors import LlmqWarning
from llmq.models.arch import weight_as_stored

if TYPE_CHECKING:
    from llmq.ptq.engine import Engine, StoredBlock


class FinishedBlocks(Protocol):
    """What an earlier run stored. read_block: a block from the stored bytes. forget_after: blocks
    behind one count as finished no more."""

    def read_block(self, index: int) -> StoredBlock: ...

    def forget_after(self, index: int) -> None: ...


def blocks_to_run(engine: Engine, first_block: int, damaged: Sequence[int]) -> Iterator[int]:
    """The blocks to solve, in order; the inputs of each lie there when it is yielded.

    A damaged block that gives other outputs than it did takes those behind it along."""
    n_blocks = len(engine.blocks)
    todo = [*damaged, *range(first_block, n_blocks)]
    if not todo:
        return
    if engine.tokens is None:
        yield from todo
        return
    start = _nearest_inputs(engine, todo[0])
    engine._record_calls(start)
    _advance(engine, start, todo[0])
    while todo:
        index = todo.pop(0)
        before = _recorded(engine, index + 1)
        yield index
        is_redone = index < first_block
        if is_redone and index + 1 < n_blocks and _recorded(engine, index + 1) != before:
            _warn(
                f"block {index}, done again, does not give the outputs that it gave: the finished "
                "blocks behind it are done again, too"
            )
            assert engine.finished is not None
            engine.finished.forget_after(index)
            first_block, todo = index + 1, list(range(index + 1, n_blocks))
        if todo and todo[0] != index + 1:
            _advance(engine, _nearest_inputs(engine, todo[0], index + 1), todo[0])


def _nearest_inputs(engine: Engine, index: int, lowest: int = 1) -> int:
    """The last block up to `index` whose inputs are there as they were sealed; 0 for none: those of
    block 0 are the embeddings, computed anew."""
    for candidate in range(index, lowest - 1, -1):
        if all(engine.inputs_of(candidate, stream).is_sound for stream in engine.streams):
            return candidate
    return lowest - 1


def _advance(engine: Engine, start: int, stop: int) -> None:
    """Run finished blocks from the inputs of block `start` to those of block `stop`."""
    if start < stop:
        _warn(
            f"the inputs of block {stop} are not there as they were left; they are computed again "
            "from the finished blocks before it"
        )
    for index in range(start, stop):
        before = _recorded(engine, index + 1)
        for stream in engine.streams:
            engine._advance(_block(engine, index, stream), index, stream)
            engine.inputs_of(index, stream).recycle(engine.inputs_of(index + 2, stream))
        if None not in before and _recorded(engine, index + 1) != before:
            _warn(
                f"block {index} does not give the outputs that it gave when it was finished: this "
                "machine computes otherwise now, and what follows is measured on what it gives"
            )


def _block(engine: Engine, index: int, stream: str) -> nn.Module:
    """A finished block as a stream runs through it."""
    name = f"{engine.prefix}.{index}"
    if stream == "full-precision":
        block = engine._materialize(index, engine._read_block(name))
        dtype = engine.precision.stream
        return block if dtype == torch.float32 else copy.deepcopy(block).to(dtype)
    assert engine.finished is not None
    stored = engine.finished.read_block(index)
    parameters = dict(stored.kept)
    for layer, tensor in stored.quantized.items():
        module = engine.model.get_submodule(layer)
        weight = tensor.to(engine.device).dequantize()
        parameters[f"{layer}.weight"] = weight_as_stored(module, weight).contiguous()
    return engine._materialize(
        index, {key.removeprefix(name + "."): value for key, value in parameters.items()}
    )


def _recorded(engine: Engine, index: int) -> list[Any]:
    """The digests of the inputs of a block by stream, None where there is none."""
    return [engine.inputs_of(index, stream).recorded for stream in engine.streams]


def _warn(message: str) -> None:
    warnings.warn(message, LlmqWarning, stacklevel=3)
