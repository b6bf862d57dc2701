"""What solved modules of a block give, kept from one pass over the text to the next.

A block is run once for every stage, and once more as it will be stored. Without this each pass
computes again all that the passes before it did: 2.3 times the products of a block. A module all of
whose layers are solved gives the same in every pass, so a pass writes down what it gives, and later
ones read that. The numbers are those that would be computed, bit for bit; `verify.py` compares the
first batch with a block that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.ptq.capture import with_forward
from llmq.ptq.streams import Streams
from llmq.storage.hidden_states import ActivationFile
from llmq.storage.room import Room

MOST_BYTES = 4_000_000_000  # of the files that are read at a time


def kept_bytes(widths: Collection[int], n_tokens: int) -> int:
    """What the files take, at most. widths: outputs of the layers of a block."""
    return min(MOST_BYTES, 4 * sum(widths) * n_tokens)


@dataclass
class _Output:
    """What a module gives, as long as that is a float32 tensor, alone or before a number of Nones.
    per_sequence: rows of dimension 0. shape: of the other dimensions. n_others: Nones, or None
    where the tensor is alone."""

    file: ActivationFile
    per_sequence: int
    shape: tuple[int, ...]
    n_others: int | None

    @classmethod
    def of(cls, output: Any, n_sequences: int, path: Path, room: Room) -> _Output | None:
        """None for an output of another kind."""
        n_others, tensor = None, output
        if isinstance(output, tuple) and output:
            if any(other is not None for other in output[1:]):
                return None
            n_others, tensor = len(output) - 1, output[0]
        is_plain = isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.dim() > 1
        if not is_plain or len(tensor) % n_sequences:
            return None
        file = ActivationFile(path, 1, tensor.numel() // n_sequences, room=room)
        return cls(file, len(tensor) // n_sequences, tuple(tensor.shape[1:]), n_others)

    def rows(self, output: Any) -> Tensor:
        """`[n_sequences, 1, ...]`, as the file has them."""
        tensor: Tensor = output if self.n_others is None else output[0]
        return tensor.reshape(-1, 1, self.file.width)

    def output(self, rows: Tensor, device: str) -> Any:
        tensor = rows.to(device).view(len(rows) * self.per_sequence, *self.shape)
        return tensor if self.n_others is None else (tensor, *[None] * self.n_others)


@dataclass
class KeptOutputs:
    """Those of one block on one stream. layers: all that are quantized. solved: those whose weights
    will not change any more. is_on: whether anything is kept at all; on a GPU reading takes longer
    than computing."""

    streams: Streams
    block: nn.Module
    layers: Collection[str]
    is_on: bool = True
    solved: set[str] = field(default_factory=set)
    _kept: dict[str, _Output] = field(default_factory=dict)
    _unfit: set[str] = field(default_factory=set)
    _writers: list[_Writer] = field(default_factory=list)  # of the pass that runs

    def __post_init__(self) -> None:
        self.is_on = self.is_on and self.streams.device == "cpu"

    @contextmanager
    def passing(self, *, is_last: bool = False) -> Iterator[None]:
        """While the text runs through the block once, from the first batch on. is_last: nothing
        is kept for a later pass."""
        if not self.is_on:
            yield
            return
        with ExitStack() as stack:
            for name, kept in self._kept.items():
                batches = kept.file.batches(self.streams.leaves.sizes)
                stack.callback(batches.close)
                stack.enter_context(
                    with_forward(self.block.get_submodule(name), self._read(kept, batches))
                )
            names = [] if is_last else [name for name in self._final() if name not in self._kept]
            writers = self._writers = [_Writer(self, name) for name in names]
            for writer in writers:
                stack.enter_context(writer.writing())
            yield
        for writer in writers:
            self._take(writer)

    def forget(self) -> None:
        """Give up what was kept: weights change after all, or the block is done."""
        for kept in self._kept.values():
            kept.file.recycle()
        self._kept.clear()
        self.solved.clear()

    def path(self, name: str) -> Path:
        return self.streams.work_dir / f"kept-{name}.bin"

    def has_room(self, width: int) -> bool:
        """Whether a file of so many numbers for every sequence fits beside the others."""
        written = [writer.output for writer in self._writers if writer.output is not None]
        every = width + sum(each.file.width for each in (*self._kept.values(), *written))
        return 4 * every * len(self.streams.tokens) <= MOST_BYTES

    def _final(self) -> list[str]:
        """The outermost modules that hold layers, all of which are solved."""
        found: list[str] = []
        for name, _ in self.block.named_modules():
            if not name or name in self._unfit or any(_lies_in(name, other) for other in found):
                continue
            own = [layer for layer in self.layers if layer == name or _lies_in(layer, name)]
            if own and self.solved.issuperset(own):
                found.append(name)
        return found

    def _read(self, kept: _Output, batches: Generator[Tensor, None, None]) -> Callable[..., Any]:
        return lambda *args, **kwargs: kept.output(next(batches), self.streams.device)

    def _take(self, writer: _Writer) -> None:
        """Keep what a whole pass gave, in the place of what lies inside of the module."""
        if writer.output is None or writer.n_calls != len(self.streams.leaves.sizes):
            if writer.begun is not None:
                writer.begun.remove()
            if writer.n_calls:  # it runs, and not once for each batch, or it gives something else
                self._unfit.add(writer.name)
            return
        for name in [each for each in self._kept if _lies_in(each, writer.name)]:
            self._kept.pop(name).file.recycle()
        self._kept[writer.name] = writer.output


class _Writer:
    """Writes down what a module gives."""

    def __init__(self, kept: KeptOutputs, name: str) -> None:
        self.kept, self.name = kept, name
        self.output: _Output | None = None
        self.begun: ActivationFile | None = None
        self.n_calls = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        module = self.kept.block.get_submodule(self.name)
        original, sizes = module.forward, self.kept.streams.leaves.sizes
        append: Callable[[Tensor], None] | None = None
        with ExitStack() as stack:

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal append
                found, number = original(*args, **kwargs), self.n_calls
                self.n_calls += 1
                if number == 0:
                    self.output = self._fitting(found, sizes[0])
                    if self.output is not None:
                        self.begun = self.output.file
                        append = stack.enter_context(self.output.file.appender(durable=False))
                if self.output is None or append is None:
                    return found
                if number < len(sizes) and self._of(found, sizes[number]) == self.output:
                    append(self.output.rows(found))
                else:
                    self.output = None
                return found

            with with_forward(module, forward):
                yield

    def _of(self, found: Any, n_sequences: int) -> _Output | None:
        streams = self.kept.streams
        return _Output.of(found, n_sequences, self.kept.path(self.name), streams.room)

    def _fitting(self, found: Any, n_sequences: int) -> _Output | None:
        output = self._of(found, n_sequences)
        return output if output is not None and self.kept.has_room(output.file.width) else None


def _lies_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")
