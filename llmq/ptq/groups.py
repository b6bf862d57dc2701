"""Layers that are measured together, and how."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from llmq.activations.ranges import RangeObserver
from llmq.models.arch import linear_weight
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
    of their layer. token_weights: what tokens count, None where all count alike."""

    stream: Stream
    both: bool
    ranges: bool
    all_experts: bool = False
    token_weights: TokenWeights | None = None

    def weights_of(
        self, streams: Streams, index: int, group: InputGroup
    ) -> Iterator[Tensor | None]:
        """By batch `[B, T]`, what tokens count for a group of a block."""
        if self.token_weights is None:
            return itertools.repeat(None)
        weights = self.token_weights.of(index, group.layers)
        return iter(weights.to(streams.device).split(streams.batch_size))

    def empty(
        self, streams: Streams, block: nn.Module, group: InputGroup, n_chunks: int | None = None
    ) -> LayerStats:
        """Statistics without rows. What is to be added of the full-precision model are its inputs,
        or the outputs of a single layer that narrows. n_chunks: that will be added, None for a
        batch each."""
        weight = linear_weight(block.get_submodule(group.first))
        return LayerStats(
            weight.shape[1],
            streams.device,
            cross=self.both,
            projection=weight if self.both and narrows(block, group.layers) else None,
            ranges=RangeObserver() if self.ranges else None,
            n_chunks=n_chunks or streams.n_batches,
        )


Measured = list[tuple[InputGroup, LayerStats]]
"""Groups that were measured and can be solved side by side."""
