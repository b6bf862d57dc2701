"""What happens around and inside a block during calibration: the arguments that the model calls it
with, and the inputs of its linear layers.

Models differ in what they hand to their blocks (masks and rotary tables per layer in Gemma and
Qwen, position ids, caches). Instead of knowing that, llmq runs the model once with every block
replaced by a recorder that passes the hidden states on: the embeddings are computed, each block's
own arguments are kept, and no block's weights are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError


class _Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block apart from the hidden states, for one batch size."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> BlockCall:
        """The same for hidden states of a dtype: masks, rotary tables and the like are cast. They
        are float32 here."""
        if dtype == torch.float32:
            return self
        return BlockCall(
            *recursively_apply(
                lambda value: value.to(dtype),
                (self.args, self.kwargs),
                test_type=lambda value: isinstance(value, Tensor) and value.is_floating_point(),
            )
        )

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class BlockRecorder:
    """Runs a model whose blocks have no weights and collects the hidden states that enter block 0
    and every block's `BlockCall`."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        self.model, self.blocks = model, blocks
        self._returns_tuple = False
        self._calls: list[BlockCall] = []
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def run(self, input_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Hidden states `[B, T, D]` before block 0, and one call per block, for tokens `[B, T]`."""
        hidden, calls = self._attempt(input_ids)
        if len(calls) < len(self.blocks):
            # Some models unpack `block(...)[0]`: the next block then sees the first sequence alone.
            self._returns_tuple = True
            hidden, calls = self._attempt(input_ids)
        if len(calls) < len(self.blocks):
            raise LlmqError(
                f"{type(self.model).__name__}: block {len(calls)} does not take the outputs of the block before it as they are, so blocks cannot be run one by one; this architecture is not supported"
            )
        return hidden, calls

    def _attempt(self, input_ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
        self._calls, self._hidden = [], []
        patched = list(self.blocks)
        for block in patched:
            block.forward = self._record  # type: ignore[method-assign,assignment]
        try:
            self.model(input_ids=input_ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for block in patched:
                del block.forward
        return self._hidden[0], self._calls

    def _record(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if self._hidden and hidden is not self._hidden[0]:
            raise _Stop
        self._hidden.append(hidden)
        self._calls.append(BlockCall(args[1:] if args and args[0] is hidden else args, kwargs))
        if len(self._calls) == len(self.blocks):
            raise _Stop
        return (hidden, None) if self._returns_tuple else hidden


@contextmanager
def _input_hooks(layers: dict[str, nn.Module], hook: Any) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(
    block: nn.Module, layers: dict[str, nn.Module], call: BlockCall, hidden: Tensor
) -> list[list[str]]:
    """Names of the layers in groups that read the very same tensor (q/k/v, gate/up), in the order
    in which they run. Layers that do not run are in no group."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for tensor, names in seen:
            if tensor is x:
                names.append(name)
                return
        seen.append((x, [name]))  # Holding the tensor keeps its identity from being reused.

    with _input_hooks(layers, note):
        call.run(block, hidden)
    return [names for _, names in seen]


def run_and_record(
    block: nn.Module,
    inputs_of: dict[str, nn.Module],
    outputs_of: dict[str, nn.Module],
    call: BlockCall,
    hidden: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output, and on the way by layer: the inputs of some, the outputs of others
    without their bias (as copies: Falcon adds to them in place)."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_input_hooks(inputs_of, seen.__setitem__))
        for name, layer in outputs_of.items():
            stack.callback(
                layer.register_forward_hook(
                    lambda layer, _, output, name=name: seen.__setitem__(
                        name, output.clone() if layer.bias is None else output - layer.bias
                    )
                ).remove
            )
        output = call.run(block, hidden)
    return output, seen


def run_until(block: nn.Module, layer: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """The input of `layer` when the block runs on `hidden`; nothing after that layer is
    computed."""
    found: list[Tensor] = []

    def stop(_: str, x: Tensor) -> None:
        found.append(x)
        raise _Stop

    with _input_hooks({"layer": layer}, stop), suppress(_Stop):
        call.run(block, hidden)
    return found[0]
