"""What hidden states behind the last block mean: the model's own norm and head say it."""

from __future__ import annotations

from torch import Tensor

from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import passing_on

# Logits at a time: 32 MiB, of which some six copies are made. The head is read once for each of
# these parts, so few positions at a time would take longer to read it than to multiply with it.
HEAD_VALUES = 1 << 23


def positions_at_once(vocab_size: int) -> int:
    """How many positions' logits are computed together."""
    return max(1, HEAD_VALUES // vocab_size)


def logits_of(blocks: Blocks, tokens: Tensor, hidden: Tensor, n_returned: int) -> Tensor:
    """`[t, V]` of hidden states `[t, D]` behind the last block, at tokens int64 `[t]`: all after it
    is by position. n_returned: see `BlockRecorder`."""
    with passing_on(blocks.modules, hidden[None], n_returned):
        logits: Tensor = blocks.model(input_ids=tokens[None], use_cache=False).logits
    return logits[0]
