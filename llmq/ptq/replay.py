"""Do not compute twice what cannot change any more.

Solving a block in running order runs it once per group of layers, and once more for its outputs. A
child of the block whose last layer is solved (the attention after o_proj, the MLP after down_proj)
has the same inputs to that layer in every later run, because everything before is solved too. These
inputs pass by anyway when the layer is measured; they are kept in a file, and from then on the
child is that one layer applied to them: the same operation on the same numbers, hence the same
bits. If it will be played once more, its outputs are kept in turn, and then nothing is left to
compute. On a Llama block this saves two runs of q/k/v and the attention, two of o_proj and one of
gate and up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmq.models.arch import linear_weight
from llmq.storage.hidden_states import ActivationFile


@dataclass(frozen=True)
class Tail:
    """The layer whose output is a child's output. rest: what else the child returns beside hidden
    states, or None when it returns these alone."""

    layer: str
    rest: tuple[Any, ...] | None


class SolvedParts:
    """The children of one block that are played back. Files go to `work_dir`: float32
    `[n_sequences, length, K of the layer]`.

    enabled: False where layers are measured on inputs that the quantized block will never see; then
    nothing is found, kept or played."""

    def __init__(
        self,
        block: nn.Module,
        targets: Collection[str],
        work_dir: Path,
        length: int,
        batch_size: int,
        *,
        enabled: bool = True,
    ) -> None:
        self.block, self.targets = block, targets
        self.work_dir, self.length, self.batch_size = work_dir, length, batch_size
        self.children = {
            name: child
            for name, child in block.named_children()
            if enabled and any(layer.startswith(name + ".") for layer in targets)
        }
        self.tails: dict[str, Tail] = {}  # by child
        # Tails whose inputs and outputs this object keeps. An interrupted run may have left files
        # of the same names.
        self._with_inputs: set[str] = set()
        self._with_outputs: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find the tails while the block runs once."""
        outputs: list[tuple[str, Tensor]] = []

        def watch_child(name: str, output: Any) -> None:
            hidden, rest = (
                (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)
            )
            # A child that returns other tensors too (attention weights) is computed each time.
            last = [
                layer
                for layer, tensor in outputs
                if tensor is hidden and layer.startswith(name + ".")
            ]
            if last and not any(isinstance(value, Tensor) for value in rest or ()):
                self.tails[name] = Tail(last[-1], rest)

        with ExitStack() as stack:
            for layer in self.targets:
                stack.callback(
                    self.block.get_submodule(layer)
                    .register_forward_hook(
                        lambda _module, _args, output, layer=layer: outputs.append((layer, output))
                    )
                    .remove
                )
            for name, child in self.children.items():
                stack.callback(
                    child.register_forward_hook(
                        lambda _module, _args, output, name=name: watch_child(name, output)
                    ).remove
                )
            yield

    def _inputs(self, layer: str) -> ActivationFile:
        return ActivationFile(
            self.work_dir / f"solved-{layer}.f32",
            self.length,
            linear_weight(self.block.get_submodule(layer)).shape[1],
        )

    def _outputs(self, layer: str) -> ActivationFile:
        return ActivationFile(
            self.work_dir / f"played-{layer}.f32",
            self.length,
            linear_weight(self.block.get_submodule(layer)).shape[0],
        )

    @contextmanager
    def keeping(self, layers: Collection[str]) -> Iterator[Callable[[str, Tensor], None]]:
        """A function that takes the inputs of a layer, batch by batch, and keeps those of tails."""
        tails = {tail.layer for tail in self.tails.values()} & set(layers)
        with ExitStack() as stack:
            append = {
                layer: stack.enter_context(self._inputs(layer).appender(durable=False))
                for layer in tails
            }

            def keep(layer: str, batch: Tensor) -> None:
                if layer in append:
                    append[layer](batch)

            yield keep
        self._with_inputs |= tails

    @contextmanager
    def playing(self, solved: Collection[str]) -> Iterator[None]:
        """For one run of the block over all batches, in order: replace the children whose tail is
        solved."""
        is_last_run = len(solved) == len(self.targets)
        kept = []
        with ExitStack() as stack:
            for name, tail in self.tails.items():
                if tail.layer not in solved or tail.layer not in self._with_inputs:
                    continue
                if tail.layer in self._with_outputs:
                    outputs = self._outputs(tail.layer).batches(self.batch_size)
                elif is_last_run:
                    outputs = self._apply(tail.layer)
                else:
                    outputs = self._apply(
                        tail.layer,
                        stack.enter_context(self._outputs(tail.layer).appender(durable=False)),
                    )
                    kept.append(tail.layer)
                child = self.children[name]
                child.forward = self._player(tail, outputs)  # type: ignore[method-assign]
                stack.callback(delattr, child, "forward")
            yield
        self._with_outputs.update(kept)

    def _apply(
        self, layer: str, keep: Callable[[Tensor], object] = lambda output: None
    ) -> Iterator[Tensor]:
        """A layer's outputs for the inputs that are kept, each handed to `keep`."""
        module = self.block.get_submodule(layer)
        for batch in self._inputs(layer).batches(self.batch_size):
            output = module(batch.to(linear_weight(module).device))
            keep(output)
            yield output

    def _player(self, tail: Tail, outputs: Iterator[Tensor]) -> Callable[..., Any]:
        """A child's forward function that returns the outputs one by one."""
        device = linear_weight(self.block.get_submodule(tail.layer)).device

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            output = next(outputs).to(device)
            return output if tail.rest is None else (output, *tail.rest)

        return forward

    def discard(self) -> None:
        """Give the files up."""
        for tail in self.tails.values():
            self._inputs(tail.layer).recycle()
            self._outputs(tail.layer).recycle()
        self._with_inputs.clear()
        self._with_outputs.clear()
