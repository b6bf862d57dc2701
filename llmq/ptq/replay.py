"""Do not compute twice what cannot change any more.

Solving a block in running order runs it once per group of layers. A child of the block whose layers are all solved (the attention, from the third group on) gives the same outputs in every later run,
because everything before it is solved too. So its outputs are recorded during the first such run and played back afterwards, bit for bit. On a Llama block this saves half of the attention work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmq.ptq.activations import ActivationFile


class SolvedParts:
    """The solved children of one block. targets: the block's layers that are quantized, relative names. files go to `work_dir`, float32 `[n_sequences, length, width]`."""

    def __init__(self, block: nn.Module, targets: Collection[str], work_dir: Path, length: int, width: int, n_sequences: int, batch_size: int) -> None:
        self.children = {name: child for name, child in block.named_children() if any(layer.startswith(name + ".") for layer in targets)}
        self.targets = set(targets)
        self.work_dir, self.length, self.width = work_dir, length, width
        self.n_sequences, self.batch_size = n_sequences, batch_size
        self.in_tuple: dict[str, tuple[Any, ...] | None] = {}  # what else a recorded child returns; its presence says that the recording is complete

    def _file(self, name: str) -> ActivationFile:
        return ActivationFile(self.work_dir / f"solved-{name}.f32", self.length, self.width)

    def _is_solved(self, name: str, solved: Collection[str]) -> bool:
        return all(layer in solved for layer in self.targets if layer.startswith(name + "."))

    @contextmanager
    def during_run(self, solved: Collection[str], *, record: bool = True) -> Iterator[None]:
        """For one run of the block over all batches, in order: play back the children that are recorded, record those that are newly solved (unless it is the last run)."""
        with ExitStack() as stack:
            for name, child in self.children.items():
                if name in self.in_tuple:
                    stack.enter_context(self._playing(name, child))
                elif record and self._is_solved(name, solved):
                    stack.enter_context(self._recording(name, child))
            yield

    @contextmanager
    def _playing(self, name: str, child: nn.Module) -> Iterator[None]:
        batches, rest = self._file(name).batches(self.batch_size), self.in_tuple[name]

        def forward(*args: Any, **kwargs: Any) -> Any:
            like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            output = next(batches).to(like.device)
            return output if rest is None else (output, *rest)

        child.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del child.forward

    @contextmanager
    def _recording(self, name: str, child: nn.Module) -> Iterator[None]:
        rests: list[tuple[Any, ...] | None] = []
        file = self._file(name)
        with file.appender(durable=False) as append:

            def note(_module: nn.Module, _args: Any, output: Any) -> None:
                tensor, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
                replayable = tensor.shape[1:] == (self.length, self.width) and not any(isinstance(value, Tensor) for value in rest or ())
                rests.append(rest)
                if replayable:
                    append(tensor)

            handle = child.register_forward_hook(note)
            try:
                yield
            finally:
                handle.remove()
        # A child that a run did not reach for every batch, or whose output is more than hidden states, is computed again each time.
        if rests and file.n_sequences == self.n_sequences:
            self.in_tuple[name] = rests[0]

    def discard(self) -> None:
        """Remove the recordings."""
        for name in self.children:
            self._file(name).path.unlink(missing_ok=True)
