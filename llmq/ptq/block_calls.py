"""The arguments of every block beside the hidden states, for any choice of calibration sequences.

Some are the same for all sequences (rotary tables, masks without padding), others belong to one
(the per-layer embeddings of Gemma 4), and which is which is not written anywhere. So two sequences
are sent through the recorder alone and as a pair: a tensor whose first dimension grows with them
has a part for each sequence, any other is one for all. Then every batch is recorded. Parts that are
equal in all sequences are kept once, in memory; the others lie in a file beside the hidden states,
where block-wise tuning finds those of the sequences it picks.

An argument that fits neither way would be calibrated wrongly without a word, so it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.ptq.batches import Batches
from llmq.ptq.capture import BlockCall, BlockRecorder, cannot_run_alone
from llmq.ptq.gathering import Gathering
from llmq.storage.hidden_states import ActivationFile

CallOf = Callable[[Sequence[int]], BlockCall]
"""The call of one block for the named sequences."""

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Value:
    """Something that is no tensor; what could be changed by a block is copied for each run."""

    value: Any

    def fresh(self) -> Any:
        return self.value if isinstance(self.value, _VALUES) else copy.deepcopy(self.value)


@dataclass
class _Slot:
    """One tensor, however many blocks take it. first: its part for the first sequence, or all of it
    where it has no parts. n_rows: rows of dimension 0 in a part, None without parts. file: the
    parts of all sequences, once two of them differ."""

    name: str
    first: Tensor
    n_rows: int | None
    path: Path
    n_seen: int = 0
    file: ActivationFile | None = None
    append: Callable[[Tensor], None] | None = None

    def parts(self, tensor: Tensor, n_sequences: int) -> Tensor:
        """`[n_sequences, rows, ...]`."""
        return tensor.reshape(n_sequences, -1, *tensor.shape[1:])

    def add(self, tensor: Tensor, n_sequences: int, stack: ExitStack) -> bool:
        """Take what the next batch has here. False when it has another shape than expected, or
        differs without having parts."""
        shape = tensor.shape
        if self.n_rows is None:
            return shape == self.first.shape and torch.equal(tensor, self.first)
        if shape != (self.n_rows * n_sequences, *self.first.shape[1:]):
            return False
        parts = self.parts(tensor, n_sequences)
        if self.append is None and not all(torch.equal(part, self.first) for part in parts):
            file = ActivationFile(self.path, 1, self.first.numel(), self.first.dtype)
            self.append = stack.enter_context(file.appender(durable=False))
            self.file = file
            for _ in range(self.n_seen):
                self.append(self.first)
        if self.append is not None:
            self.append(parts)
        self.n_seen += n_sequences
        return True

    def of(self, sequences: Sequence[int]) -> Tensor:
        """What a batch of these sequences gets."""
        if self.n_rows is None:
            return self.first
        n, shape = len(sequences), self.first.shape
        if self.file is None:
            parts = self.first.expand(n, *shape) if n > 1 else self.first
        else:
            parts = self.file.sequences(sequences).to(self.first.device)
        return parts.reshape(n * self.n_rows, *shape[1:])

    def gathered(self, gathering: Gathering) -> _Slot:
        """The slot with the parts of all processes, where they differ."""
        if self.n_rows is None:
            return self
        content = self.first.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        own = (self.file is not None, sha256(content.data).hexdigest())
        if len(set(gathering.ranks.gathered(own))) == 1 and self.file is None:
            return self
        path = self.path.with_name(f"all-{self.path.name}")
        whole = ActivationFile(path, 1, self.first.numel(), self.first.dtype)
        gathering.write(self._own_parts(gathering.leaves.sizes), whole)
        return replace(self, path=path, file=whole)

    def _own_parts(self, sizes: Sequence[int]) -> Iterator[Tensor]:
        """`[n, 1, numbers of a part]`, batch by batch."""
        start = 0
        for size in sizes:
            parts = self.of(range(start, start + size))
            yield parts.cpu().reshape(size, 1, -1).contiguous()
            start += size


@dataclass
class BlockCalls:
    """See the module's text."""

    model: PreTrainedModel
    work_dir: Path
    _trees: list[TreeSpec] = field(default_factory=list)  # by block
    _leaves: list[list[_Value | int]] = field(default_factory=list)  # a number: of a slot
    _slots: list[_Slot] = field(default_factory=list)

    @classmethod
    def record(
        cls,
        recorder: BlockRecorder,
        batches: Batches,
        work_dir: Path,
        keep: Callable[[Tensor], object] = lambda hidden: None,
    ) -> BlockCalls:
        """Record the calls for all sequences, batch by batch on the recorder's device; `keep` gets
        the hidden states before block 0 of each. Raises `LlmqError` for arguments that cannot be
        told apart by sequence."""
        calls = cls(recorder.model, work_dir)
        _, alone = recorder.run(**batches.of([0]))
        _, together = recorder.run(**batches.of([0, len(batches.tokens) - 1]))
        calls._define(alone, together)
        del alone, together
        with ExitStack() as stack:
            for batch in batches:
                hidden, recorded = recorder.run(**batch)
                calls._add(recorded, len(hidden), stack)
                keep(hidden)
        return calls

    def of(self, index: int, dtype: torch.dtype = torch.float32) -> CallOf:
        """The calls of block `index` for hidden states of a dtype."""
        leaves, tree = self._leaves[index], self._trees[index]
        of_size: dict[tuple[int, int], Tensor] = {}  # what all sequences have in common

        def tensor(number: int, sequences: Sequence[int]) -> Tensor:
            slot, key = self._slots[number], (number, len(sequences))
            if slot.file is not None:
                return _cast(slot.of(sequences), dtype)
            if key not in of_size:
                of_size[key] = _cast(slot.of(sequences), dtype)
            return of_size[key]

        def call(sequences: Sequence[int]) -> BlockCall:
            values = [
                leaf.fresh() if isinstance(leaf, _Value) else tensor(leaf, sequences)
                for leaf in leaves
            ]
            args, kwargs = tree_unflatten(values, tree)
            return BlockCall(args, kwargs)

        return call

    def gathered(self, index: int, gathering: Gathering) -> CallOf:
        """The calls of block `index` for all sequences of all processes, each of which calls this;
        the first one alone gets what the others have."""
        if not gathering.ranks.are_many:
            return self.of(index)
        slots = list(self._slots)
        for number in sorted({leaf for leaf in self._leaves[index] if isinstance(leaf, int)}):
            slots[number] = slots[number].gathered(gathering)
        return replace(self, _slots=slots).of(index)

    def batches(
        self, index: int, inputs: ActivationFile, sizes: int | Sequence[int], device: str
    ) -> Iterator[tuple[BlockCall, Tensor]]:
        """The calls of block `index` and its inputs on a device, so many sequences at a time."""
        call_of, start = self.of(index, inputs.dtype), 0
        for hidden in inputs.batches(sizes):
            yield call_of(range(start, start + len(hidden))), hidden.to(device)
            start += len(hidden)

    def forget(self, index: int) -> None:
        """Remove the files that no block after `index` takes."""
        later: set[int] = set()
        for leaves in self._leaves[index + 1 :]:
            later.update(leaf for leaf in leaves if isinstance(leaf, int))
        for number, slot in enumerate(self._slots):
            if slot.file is not None and number not in later:
                slot.path.unlink(missing_ok=True)

    def _define(self, alone: list[BlockCall], together: list[BlockCall]) -> None:
        """Find the slots, and which of them have parts, in the calls for one and two sequences."""
        numbers: dict[int, int] = {}  # by identity; the calls keep their tensors alive
        for index, (one, two) in enumerate(zip(alone, together, strict=True)):
            flat_one, tree = tree_flatten((one.args, one.kwargs))
            flat_two, tree_two = tree_flatten((two.args, two.kwargs))
            if tree != tree_two:
                raise self._refusal(index, "other arguments for two sequences than for one")
            leaves: list[_Value | int] = []
            for name, value, other in zip(_names(tree), flat_one, flat_two, strict=True):
                if isinstance(value, Tensor) != isinstance(other, Tensor):
                    raise self._refusal(index, f"{name} as a tensor for some batches only")
                if not isinstance(value, Tensor):
                    leaves.append(_Value(copy.deepcopy(value)))
                    continue
                if id(value) not in numbers:
                    numbers[id(value)] = len(self._slots)
                    self._slots.append(self._slot(index, name, value, other))
                leaves.append(numbers[id(value)])
            self._trees.append(tree)
            self._leaves.append(leaves)

    def _slot(self, index: int, name: str, one: Tensor, two: Tensor) -> _Slot:
        n_rows = None
        if one.shape != two.shape:
            grows = one.dim() > 0 and two.shape == (2 * len(one), *one.shape[1:])
            if not grows or not len(one):
                shapes = f"{list(one.shape)} for one sequence and {list(two.shape)} for two"
                raise self._refusal(index, f"{name} of shape {shapes}")
            n_rows = len(one)
        path = self.work_dir / f"argument-{len(self._slots):05d}.bin"
        return _Slot(name, one.detach().clone(), n_rows, path)

    def _add(self, recorded: list[BlockCall], n_sequences: int, stack: ExitStack) -> None:
        """Take the calls of the next batch."""
        seen: dict[int, Tensor] = {}
        for index, call in enumerate(recorded):
            values, tree = tree_flatten((call.args, call.kwargs))
            if tree != self._trees[index]:
                raise self._refusal(index, "other arguments for one batch than for another")
            for leaf, value in zip(self._leaves[index], values, strict=True):
                if isinstance(leaf, _Value):
                    if isinstance(leaf.value, _VALUES) and leaf.value != value:
                        raise self._refusal(index, f"{value!r} in one batch, {leaf.value!r} before")
                    continue
                slot = self._slots[leaf]
                if leaf in seen:
                    is_same = value is seen[leaf] or torch.equal(value, seen[leaf])
                else:
                    seen[leaf] = value
                    is_same = isinstance(value, Tensor) and slot.add(value, n_sequences, stack)
                if not is_same:
                    raise self._refusal(
                        index, f"{slot.name}, which changes from batch to batch but not by sequence"
                    )

    def _refusal(self, index: int, what: str) -> LlmqError:
        return cannot_run_alone(self.model, f"block {index} takes {what}")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _names(tree: TreeSpec) -> Iterator[str]:
    """What the leaves are called: `args[0]`, `kwargs['attention_mask']`."""
    filled = tree_unflatten(list(range(tree.num_leaves)), tree)
    for path, _ in tree_flatten_with_path(filled)[0]:
        yield keystr(path).replace("[0]", "args", 1).replace("[1]", "kwargs", 1)
