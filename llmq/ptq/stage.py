"""A stage: layers of a block whose inputs are measured in one recording pass, before any of them is
solved.

Inside a block, layers are solved in the order in which they run and see the repairs of those before
("true-sequential"), so a stage ends where a layer reads what another one has changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.models.experts import unfused_in
from llmq.ptq.capture import record_inputs, shared_inputs
from llmq.ptq.experts import ExpertsStage
from llmq.ptq.groups import InputGroup, Measured, Recording
from llmq.ptq.streams import Streams, narrows
from llmq.ptq.transforms.apply import Moved


@dataclass(frozen=True)
class Stage:
    """Groups in running order. moved: what transforms have moved in the block, which the
    full-precision model's rows are not of. coverage: of experts, which have stages of their own."""

    groups: tuple[InputGroup, ...]
    moved: tuple[Moved, ...] = ()
    coverage: None = None

    def after(self, moved: Moved) -> Stage:
        """The stage once something more has moved."""
        return replace(self, moved=(*self.moved, moved))

    def recording_exact(self, streams: Streams, block: nn.Module) -> AbstractContextManager[None]:
        """Nothing: the rows of groups are kept by the stream itself."""
        return nullcontext()

    def measure(
        self, recording: Recording, streams: Streams, block: nn.Module, index: int
    ) -> Iterator[list[Measured]]:
        """One pass over the stream that ends at the stage's last layer, and the statistics of each
        group. Processes take turns as owners."""
        owner = index % recording.ranks.size
        if not recording.is_needed:
            for group in self.groups:
                yield [Measured(owner, [(group, None)])]
            return
        stats = {group: recording.empty(streams, block, group) for group in self.groups}
        exact = {
            group: streams.exact_rows(block, group.layers).batches(streams.leaves.sizes)
            if recording.both
            else itertools.repeat(None)
            for group in self.groups
        }
        weights = {group: recording.weights_of(streams, index, group) for group in self.groups}
        firsts = {group.first: block.get_submodule(group.first) for group in self.groups}
        with recording.passing():
            for call, hidden in streams.batches(index, recording.stream):
                rows = record_inputs(block, firsts, call, hidden)
                for group in self.groups:
                    x, y = rows[group.first], next(exact[group])
                    if y is not None:
                        y = self._as_moved(block, group, y.to(streams.device))
                    stats[group].add(x, y, next(weights[group]))
        for group in self.groups:
            streams.exact_rows(block, group.layers).recycle()
            yield [Measured(owner, [(group, recording.finished(stats[group], owner))])]

    def _as_moved(self, block: nn.Module, group: InputGroup, rows: Tensor) -> Tensor:
        """What the group's rows would be in the transformed full-precision model: its inputs, or
        the outputs of a layer that narrows."""
        for moved in self.moved:
            factors = moved.rows if narrows(block, group.layers) else moved.columns
            if group.first in factors:
                rows = rows / factors[group.first]
        return rows


def find_stages(
    streams: Streams, block: nn.Module, index: int, name: str, layers: Sequence[str]
) -> list[Stage | ExpertsStage]:
    """The stages of block `index`, called `name`, found by running it on the first batch. Every
    group of a dense block reads what the layers before it gave, so each is a stage of its own, and
    so is a module of experts. Raises `LlmqError` for layers that do not run."""
    if not layers:
        return []
    experts = {
        module: [layer for layer in layers if layer.startswith(module + ".")]
        for module in unfused_in(block)
    }
    inside = {layer for group in experts.values() for layer in group}
    watched = [layer for layer in layers if layer not in inside]
    watched += [module for module, group in experts.items() if group]
    call, hidden = next(streams.batches(index, "quantized"))
    groups = shared_inputs(
        block, {each: block.get_submodule(each) for each in watched}, call, hidden
    )
    if idle := set(watched).difference(*groups):
        raise LlmqError(
            f"{name}.{min(idle)}: this layer did not run on the calibration text, so it cannot "
            f"be calibrated; keep it with --rule '*{min(idle)}=keep'"
        )
    stages: list[Stage | ExpertsStage] = []
    for group in groups:
        if dense := tuple(each for each in group if each not in experts):
            stages.append(Stage((InputGroup(dense),)))
        modules = (each for each in group if each in experts)
        stages += [ExpertsStage(each, frozenset(experts[each])) for each in modules]
    return stages
