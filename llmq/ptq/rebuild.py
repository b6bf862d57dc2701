"""Inputs of blocks that have to be solved again.

The inputs of a block are given up when it is finished. Where a finished block or the inputs of the
next turn out to be damaged, they are computed again by running the blocks before, which are there:
the quantized stream through the weights that were stored, the full-precision stream through those
of the source. Running is cheap beside solving, and gives the same bits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from llmq.errors import LlmqWarning
from llmq.ptq.block import Setup
from llmq.ptq.results import EarlierRun
from llmq.ptq.streams import Stream, Streams


@dataclass
class Rebuild:
    """earlier: the run that is continued, where there is one."""

    setup: Setup
    earlier: EarlierRun | None

    @property
    def first_block(self) -> int:
        """The first that is not finished."""
        return 0 if self.earlier is None else self.earlier.first_block

    @property
    def todo(self) -> list[int]:
        """Blocks to solve."""
        damaged = () if self.earlier is None else self.earlier.damaged
        return [*damaged, *range(self.first_block, len(self.setup.blocks))]

    @cached_property
    def start(self) -> int | None:
        """The block whose inputs the run begins with: 0 for the embeddings, computed anew; None
        when no inputs are needed."""
        if not self.todo or self.setup.streams is None:
            return None
        return self._nearest_inputs(self.setup.streams, self.todo[0])

    def blocks_to_run(self) -> Iterator[int]:
        """The blocks to solve, in order; the inputs of each lie there when it is yielded.

        A damaged block that gives other outputs than it did takes those behind it along."""
        todo, first_block = self.todo, self.first_block
        streams = self.setup.streams
        if streams is None or self.start is None:
            yield from todo
            return
        n_blocks = len(self.setup.blocks)
        self._advance(streams, self.start, todo[0])
        while todo:
            index = todo.pop(0)
            before = _recorded(streams, index + 1)
            yield index
            is_redone = index < first_block
            is_other = _recorded(streams, index + 1) != before
            if is_redone and index + 1 < n_blocks and self.setup.ranks.any(is_other):
                _warn(
                    f"block {index}, done again, does not give the outputs that it gave: the "
                    "finished blocks behind it are done again, too"
                )
                assert self.earlier is not None
                self.earlier.finished.forget_after(index)
                first_block, todo = index + 1, list(range(index + 1, n_blocks))
            if todo and todo[0] != index + 1:
                start = self._nearest_inputs(streams, todo[0], index + 1)
                self._advance(streams, start, todo[0])

    def _nearest_inputs(self, streams: Streams, index: int, lowest: int = 1) -> int:
        """The last block up to `index` whose inputs are there as they were sealed; `lowest` - 1 for
        none."""
        for candidate in range(index, lowest - 1, -1):
            sound = all(streams.inputs_of(candidate, stream).is_sound for stream in streams.names)
            if self.setup.ranks.all(sound):
                return candidate
        return lowest - 1

    def _advance(self, streams: Streams, start: int, stop: int) -> None:
        """Run finished blocks from the inputs of block `start` to those of block `stop`."""
        if start < stop:
            _warn(
                f"the inputs of block {stop} are not there as they were left; they are computed "
                "again from the finished blocks before it"
            )
        for index in range(start, stop):
            before = _recorded(streams, index + 1)
            for stream in streams.names:
                streams.advance(self._block(index, stream), index, stream)
            streams.recycle(index)
            if None not in before and _recorded(streams, index + 1) != before:
                _warn(
                    f"block {index} does not give the outputs that it gave when it was finished: "
                    "this machine computes otherwise now, and what follows is measured on what it "
                    "gives"
                )

    def _block(self, index: int, stream: Stream) -> nn.Module:
        """A finished block as a stream runs through it."""
        blocks = self.setup.blocks
        if stream == "quantized":
            assert self.earlier is not None
            return blocks.rebuild(index, self.earlier.finished.read_block(index))
        block, dtype = blocks.load(index), self.setup.precision.stream
        return block if dtype == torch.float32 else copy.deepcopy(block).to(dtype)


def _recorded(streams: Streams, index: int) -> list[Any]:
    """The digests of the inputs of a block by stream, None where there is none."""
    return [streams.inputs_of(index, stream).recorded for stream in streams.names]


def _warn(message: str) -> None:
    warnings.warn(message, LlmqWarning, stacklevel=3)
