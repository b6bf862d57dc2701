"""The hidden states that run through the model, block by block, for all calibration sequences.

Two streams run side by side: what the quantized model computes, always in float32, and what the
full-precision model computes, which tells each layer what was lost before it. Their files lie in
the work folder, so that a run can start again at any block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from llmq.models.arch import linear_weight
from llmq.ptq.batches import Batches
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.capture import BlockCall, run_and_record
from llmq.ptq.leaves import Leaves
from llmq.recipe import LayerPlan
from llmq.storage.hidden_states import ActivationFile
from llmq.storage.room import Room
from llmq.text.picture_windows import PictureInputs

Stream = Literal["quantized", "full-precision"]

# of one activation of the widest layer; larger batches leave the caches, cost memory and are no
# faster on a CPU
BATCH_BYTES = 4_000_000


def batch_size(plans: list[LayerPlan], length: int) -> int:
    """Sequences of `length` tokens that run through a block at a time."""
    widest = max(max(plan.layer.shape) for plan in plans)
    return max(1, BATCH_BYTES // (4 * widest * length))


@dataclass
class Streams:
    """names: the streams that are needed. dtypes: what each is kept in. last: the last block by
    stream whose inputs are needed. tokens: int64 `[n_sequences, T]`, those of this process. width:
    of hidden states. leaves: which of them run through a block together. pictures: what the
    sequences hold beside tokens. calls: the other arguments of every block, once they are
    recorded. room: memory that files may lie in."""

    names: list[Stream]
    dtypes: dict[Stream, torch.dtype]
    last: dict[Stream, int]
    tokens: Tensor
    width: int
    leaves: Leaves
    work_dir: Path
    device: str
    pictures: PictureInputs | None = None
    calls: BlockCalls | None = None
    room: Room = field(default_factory=Room)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def model_inputs(self) -> Batches:
        """What the model takes for all sequences."""
        return Batches(self.tokens, self.leaves.sizes, self.device, self.pictures)

    def inputs_of(self, index: int, stream: Stream = "quantized") -> ActivationFile:
        """The file of the inputs of block `index`."""
        path = self.work_dir / f"inputs-{stream}-{index:05d}.bin"
        return ActivationFile(path, self.length, self.width, self.dtypes[stream], self.room)

    def batches(self, index: int, stream: Stream) -> Iterator[tuple[BlockCall, Tensor]]:
        """The calls of block `index` and their hidden states, in order."""
        assert self.calls is not None
        inputs = self.inputs_of(index, stream)
        return self.calls.batches(index, inputs, self.leaves.sizes, self.device)

    def exact_rows(self, block: nn.Module, group: Sequence[str]) -> ActivationFile:
        """The file of a group's inputs in the full-precision model, or of its only layer's outputs
        if there are fewer of these. Kept as bfloat16: what counts is a mean over all tokens."""
        n, k = linear_weight(block.get_submodule(group[0])).shape
        path = self.work_dir / f"exact-{group[0]}.bf16"
        width = n if narrows(block, group) else k
        return ActivationFile(path, self.length, width, torch.bfloat16, self.room)

    def advance(
        self, block: nn.Module, index: int, stream: Stream, record: Sequence[Sequence[str]] = ()
    ) -> Tensor:
        """Run a block over a stream, write the next block's inputs where they are needed, and the
        `exact_rows` of the groups to record. Returns the first batch's output."""
        inputs: dict[str, nn.Module] = {}
        outputs: dict[str, nn.Module] = {}
        for group in record:
            layers = outputs if narrows(block, group) else inputs
            layers[group[0]] = block.get_submodule(group[0])
        first: Tensor | None = None
        with ExitStack() as stack:
            exact = {
                group[0]: stack.enter_context(self.exact_rows(block, group).appender(durable=False))
                for group in record
            }
            is_needed = index < self.last[stream]
            append = None
            if is_needed:
                append = stack.enter_context(self.inputs_of(index + 1, stream).appender())
            for call, hidden in self.batches(index, stream):
                if not is_needed and not exact and first is not None:
                    break  # nobody reads the other outputs
                output, rows = run_and_record(block, inputs, outputs, call, hidden)
                for layer, x in rows.items():
                    exact[layer](x)
                if append is not None:
                    append(output)
                first = output if first is None else first
        assert first is not None
        return first

    def recycle(self, index: int) -> None:
        """Give the inputs of a block up that is done; those of the next but one are written over
        them."""
        for stream in self.names:
            self.inputs_of(index, stream).recycle(self.inputs_of(index + 2, stream))


def narrows(block: nn.Module, group: Sequence[str]) -> bool:
    """Whether a group is a single layer with fewer outputs than inputs."""
    n, k = linear_weight(block.get_submodule(group[0])).shape
    return len(group) == 1 and n < k
