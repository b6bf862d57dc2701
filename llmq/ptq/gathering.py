"""A block's hidden states of all calibration sequences in one process, for work whose every step
waits for the one before it, such as block-wise tuning: the first process does it, while the others
wait. It then computes what one process alone would, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmq.ptq.leaves import Leaves
from llmq.ptq.ranks import Ranks
from llmq.storage.hidden_states import ActivationFile


@dataclass(frozen=True)
class Gathering:
    """leaves: of the process that this is. written: what was gathered and not given up yet."""

    ranks: Ranks
    leaves: Leaves
    written: list[ActivationFile] = field(default_factory=list)

    def states(self, own: ActivationFile) -> ActivationFile:
        """The hidden states of all sequences, in a file beside its own; the first process alone has
        them, and of one process they are its own. All processes call this."""
        if not self.ranks.are_many:
            return own
        whole = replace(own, path=own.path.with_name(f"all-{own.path.name}"))
        self.write(own.batches(self.leaves.sizes), whole)
        return whole

    def write(self, own: Iterator[Tensor], whole: ActivationFile) -> None:
        """Have the first process write what all have, batch by batch as the leaves are cut."""
        if not self.ranks.is_first:
            for batch in own:
                self.ranks.send(batch.view(torch.uint8), 0)
            return
        self.written.append(whole)
        with whole.appender(durable=False) as append:
            for batch in own:
                append(batch)
            for rank in range(1, self.ranks.size):
                for size in replace(self.leaves, rank=rank).sizes:
                    like = torch.empty(size, whole.length, whole.width, dtype=whole.dtype)
                    append(self.ranks.receive(like.view(torch.uint8), rank).view(whole.dtype))

    def forget(self) -> None:
        """Give up all that was gathered."""
        while self.written:
            self.written.pop().remove()
