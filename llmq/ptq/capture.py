"""What happens around and inside a block during calibration: the arguments that the model calls it
with, and the inputs of its linear layers.

Models differ in what they hand to their blocks (masks and rotary tables per layer in Gemma and
Qwen, position ids, caches). Instead of knowing that, llmq runs the model once with every block
replaced by a recorder that passes the hidden states on: the embeddings are computed, each block's
own arguments are kept, and no block's weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError


class Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block apart from the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def first_line(error: BaseException) -> str:
    """An error of somebody else's code in a few words."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


class BlockRecorder:
    """Runs a model whose blocks have no weights and collects the hidden states that enter block 0
    and every block's `BlockCall`."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        self.model, self.blocks = model, blocks
        # What a block gives back: hidden states alone (0), or in a tuple of so many. Found out by
        # the first run.
        self.n_returned = 0
        self._calls: list[BlockCall] = []
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def run(self, input_ids: Tensor, **more: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Hidden states `[B, T, D]` before block 0, and one call per block, for tokens `[B, T]` and
        what else the model takes beside them. Raises `CannotRunAloneError` for a model whose blocks
        do not simply follow each other."""
        inputs = {"input_ids": input_ids, **more}
        hidden, calls, error = self._attempt(inputs)
        # Some models unpack what a block returns. Given a tensor, the next block then sees its
        # first sequence alone, or there is an error.
        for n_returned in (2, 3):
            if self.n_returned or len(calls) == len(self.blocks):
                break
            attempt = self._attempt(inputs, n_returned)
            if len(attempt[1]) > len(calls):  # what comes furthest tells most
                hidden, calls, error = attempt
            self.n_returned = n_returned if len(calls) == len(self.blocks) else 0
        if hidden is None:
            reason = f"it cannot be run with its blocks replaced ({error})"
        elif hidden.shape[:-1] != input_ids.shape:
            reason = (
                f"its blocks pass on hidden states of shape {list(hidden.shape)} for tokens "
                f"{list(input_ids.shape)} instead of one vector per token"
            )
        elif len(calls) < len(self.blocks):
            reason = (
                f"block {len(calls)} does not take the outputs of the block before it as they "
                f"are{error and f' ({error})'}"
            )
        else:
            return hidden, calls
        raise cannot_run_alone(self.model, reason)

    def _attempt(
        self, inputs: dict[str, Tensor], n_returned: int = 0
    ) -> tuple[Tensor | None, list[BlockCall], str]:
        """Hidden states before block 0, calls, and what ended the run early, if it was an error."""
        self._calls, self._hidden = [], []
        n_returned = n_returned or self.n_returned
        error = ""

        def record(*args: Any, **kwargs: Any) -> Any:
            return self._record(n_returned, *args, **kwargs)

        patched = list(self.blocks)
        for block in patched:
            block.forward = record  # type: ignore[method-assign]
        try:
            self.model(**inputs, use_cache=False)
        except Stop:
            pass
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as found:  # whatever a model's own code does without its blocks
            error = first_line(found)
        finally:
            for block in patched:
                del block.forward
        return self._hidden[0] if self._hidden else None, self._calls, error

    def _record(self, n_returned: int, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if self._hidden and hidden is not self._hidden[0]:
            raise Stop
        self._hidden.append(hidden)
        self._calls.append(BlockCall(args[1:] if args and args[0] is hidden else args, kwargs))
        if len(self._calls) == len(self.blocks):
            raise Stop
        return (hidden, *[None] * (n_returned - 1)) if n_returned else hidden


class CannotRunAloneError(LlmqError):
    """The refusal of an architecture whose blocks cannot be run one by one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: {reason}, so its blocks cannot be run one by one; this architecture is not "
            "supported with calibration text (--method rtn needs none)"
        )
        self.name, self.reason = name, reason

    def with_pictures(self) -> LlmqError:
        """What it means where windows have pictures: of text alone nothing is said."""
        return LlmqError(
            f"{self.name}, with pictures: {self.reason}, so its blocks cannot be run one by one; "
            "calibrate on the text alone: FILE#COLUMN"
        )


def cannot_run_alone(model: PreTrainedModel, reason: str) -> CannotRunAloneError:
    return CannotRunAloneError(type(model).__name__, reason)


@contextmanager
def passing_on(modules: nn.ModuleList, hidden: Tensor, n_returned: int) -> Iterator[None]:
    """The model with blocks that give these hidden states. n_returned: see `BlockRecorder`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *[None] * (n_returned - 1)) if n_returned else hidden

    with ExitStack() as stack:
        for block in modules:
            stack.enter_context(with_forward(block, forward))
        yield


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward pass for a while."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _input_hooks(layers: dict[str, nn.Module], hook: Any) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: hook(name, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
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


def record_inputs(
    block: nn.Module, layers: dict[str, nn.Module], call: BlockCall, hidden: Tensor
) -> dict[str, Tensor]:
    """The inputs of `layers` by name when the block runs on `hidden`; nothing after the last of
    them is computed."""
    found: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        found[name] = x
        if len(found) == len(layers):
            raise Stop

    with _input_hooks(layers, note), suppress(Stop):
        call.run(block, hidden)
    return found
