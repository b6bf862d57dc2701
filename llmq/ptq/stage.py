"""A stage: layers of a block whose inputs are measured in one recording pass, before any of them is
solved.

Inside a block, layers are solved in the order in which they run and see the repairs of those before
("true-sequential"), so a stage ends where a layer reads what another one has changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from llmq.activations.ranges import RangeObserver
from llmq.errors import LlmqError
from llmq.models.arch import linear_weight
from llmq.ptq.capture import record_inputs, shared_inputs
from llmq.ptq.stats import LayerStats
from llmq.ptq.streams import Stream, Streams, narrows


@dataclass(frozen=True)
class InputGroup:
    """Layers that read the very same tensor (q/k/v, gate/up): they share its statistics."""

    layers: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.layers[0]


@dataclass(frozen=True)
class Stage:
    """Groups in running order."""

    groups: tuple[InputGroup, ...]


def find_stages(
    streams: Streams, block: nn.Module, index: int, name: str, layers: Sequence[str]
) -> list[Stage]:
    """The stages of block `index`, called `name`, found by running it on the first batch. Every
    group of a dense block reads what the layers before it gave, so each is a stage of its own.
    Raises `LlmqError` for layers that do not run."""
    if not layers:
        return []
    call, hidden = next(streams.batches(index, "quantized"))
    groups = shared_inputs(
        block, {layer: block.get_submodule(layer) for layer in layers}, call, hidden
    )
    if idle := set(layers).difference(*groups):
        raise LlmqError(
            f"{name}.{min(idle)}: this layer did not run on the calibration text, so it cannot "
            f"be calibrated; keep it with --rule '*{min(idle)}=keep'"
        )
    return [Stage((InputGroup(tuple(group)),)) for group in groups]


@dataclass(frozen=True)
class Recording:
    """How a stage is measured. stream: on which hidden states. both: against the rows that the
    full-precision model has there. ranges: of activations, too."""

    stream: Stream
    both: bool
    ranges: bool

    def measure(
        self,
        streams: Streams,
        block: nn.Module,
        index: int,
        stage: Stage,
    ) -> Iterator[tuple[InputGroup, LayerStats]]:
        """One pass over the stream that ends at the stage's last layer, and the statistics of each
        group."""
        stats = {group: self._empty(streams, block, group) for group in stage.groups}
        exact = {
            group: streams.exact_rows(block, group.layers).batches(streams.batch_size)
            if self.both
            else itertools.repeat(None)
            for group in stage.groups
        }
        firsts = {group.first: block.get_submodule(group.first) for group in stage.groups}
        for call, hidden in streams.batches(index, self.stream):
            rows = record_inputs(block, firsts, call, hidden)
            for group in stage.groups:
                x, y = rows[group.first], next(exact[group])
                stats[group].add(x, None if y is None else y.to(streams.device))
        for group in stage.groups:
            streams.exact_rows(block, group.layers).recycle()
            yield group, stats[group].finish()

    def _empty(self, streams: Streams, block: nn.Module, group: InputGroup) -> LayerStats:
        weight = linear_weight(block.get_submodule(group.first))
        return LayerStats(
            weight.shape[1],
            streams.device,
            cross=self.both,
            projection=weight if self.both and narrows(block, group.layers) else None,
            ranges=RangeObserver() if self.ranges else None,
            n_chunks=streams.n_batches,
        )
