"""Layers that are measured together, and how."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from llmq.activations.ranges import RangeObserver
from llmq.models.arch import linear_weight
from llmq.ptq.ranks import ONE, Ranks
from llmq.ptq.stats import LayerStats
from llmq.ptq.streams import Stream, Streams, narrows
from llmq.ptq.token_weights import TokenWeights


@dataclass(frozen=True)
class InputGroup:
    """Layers that read the very same tensor (q/k/v, gate/up): they share its statistics."""

    layers: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.layers[0]


@dataclass(frozen=True)
class Recording:
    """How a stage is measured. stream: on which hidden states. both: against the rows that the
    full-precision model has there. ranges: of activations, too. all_experts: experts on all tokens
    of their layer. token_weights: what tokens count, None where all count alike. ranks: who
    measures. passing: what surrounds a pass over the text."""

    stream: Stream
    both: bool
    ranges: bool
    all_experts: bool = False
    token_weights: TokenWeights | None = None
    ranks: Ranks = ONE
    passing: Callable[[], AbstractContextManager[None]] = nullcontext
    is_needed: bool = True

    def weights_of(
        self, streams: Streams, index: int, group: InputGroup
    ) -> Iterator[Tensor | None]:
        """By batch `[B, T]`, what tokens count for a group of a block."""
        if self.token_weights is None:
            return itertools.repeat(None)
        weights = self.token_weights.of(index, group.layers)
        return iter(weights.to(streams.device).split(streams.leaves.sizes))

    def empty(
        self,
        streams: Streams,
        block: nn.Module,
        group: InputGroup,
        chunks: Sequence[int] | None = None,
    ) -> LayerStats:
        """Statistics without rows. What is to be added of the full-precision model are its inputs,
        or the outputs of a single layer that narrows. chunks: that will be added of each leaf,
        None for one of every batch."""
        weight = linear_weight(block.get_submodule(group.first))
        return LayerStats(
            weight.shape[1],
            streams.device,
            cross=self.both,
            projection=weight if self.both and narrows(block, group.layers) else None,
            ranges=RangeObserver(streams.leaves.own.start) if self.ranges else None,
            chunks=chunks or [len(leaf) for leaf in streams.leaves.batches],
        )

    def finished(self, stats: LayerStats, owner: int) -> LayerStats | None:
        """The statistics over the text of all processes, for the one that owns them."""
        stats.gather(self.ranks, owner)
        return stats.finish() if self.ranks.rank == owner else None


@dataclass(frozen=True)
class Measured:
    """Groups that were measured and can be solved side by side, and the process that does it.
    groups: with their statistics, which the others have none of."""

    owner: int
    groups: list[tuple[InputGroup, LayerStats | None]]
