"""Whether blocks run one by one are the model, asked once before anything is solved.

The model's own forward pass runs over one sequence, with the weights of one block in memory at a
time. Beside each block as the model calls it, the same block runs as the engine will call it, on
the same hidden states. If the two differ, blocks depend on something that passes between them
beside the hidden states (keys and values that later blocks reuse), and every calibration would be
of another model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.ptq.capture import BlockCall, cannot_run_alone, first_line

# of the length of a block's output: float32 noise of kernels that add up in another order is 1e-6
TOLERANCE = 1e-4


class _Done(Exception):
    """Ends the forward pass after the last block."""


@torch.no_grad()
def check_blocks(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    inputs: Mapping[str, Tensor],
    materialize: Callable[[int], nn.Module],
    call_of: Callable[[int], BlockCall],
) -> None:
    """Raise `LlmqError` when a block on its own does not give what it gives in the model.

    model: with real weights outside the blocks. inputs: what it takes for one sequence, by name.
    materialize: a block with its weights. call_of: the engine's call of a block for this
    sequence."""

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            block = materialize(index)
            block.__dict__.pop("forward", None)  # the copy of this function
            hidden = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
            output = block(*args, **kwargs)
            _compare(model, index, _hidden_states(output), block, call_of(index), hidden)
            if index == len(blocks) - 1:
                raise _Done
            return output

        return forward

    for index, block in enumerate(blocks):
        block.forward = forward_of(index)  # type: ignore[method-assign]
    try:
        model(**inputs, use_cache=False)
    except _Done:
        return
    except (LlmqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code
        raise cannot_run_alone(model, f"it does not run ({first_line(error)})") from error
    finally:
        for block in blocks:
            del block.forward
    raise cannot_run_alone(model, f"it did not come to block {len(blocks) - 1}")


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _compare(
    model: PreTrainedModel,
    index: int,
    own: Tensor,
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
) -> None:
    """Whether a block gives the hidden states `own` on its own, too."""
    try:
        alone = call.run(block, hidden)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code
        reason = f"block {index} needs what earlier blocks leave behind ({first_line(error)})"
        raise cannot_run_alone(model, reason) from error
    if alone.shape != own.shape or own.shape != hidden.shape:
        reason = (
            f"block {index} gives {list(alone.shape)} on its own and {list(own.shape)} in the "
            f"model from hidden states of shape {list(hidden.shape)}"
        )
        raise cannot_run_alone(model, reason)
    finite = torch.isfinite(own) & torch.isfinite(alone)
    difference = float((alone - own)[finite].double().norm())
    length = float(own[finite].double().norm())
    if difference > TOLERANCE * length:
        reason = (
            f"block {index} on its own is {difference / length:.1%} off what it gives in the model"
        )
        raise cannot_run_alone(model, reason)
