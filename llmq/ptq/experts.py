"""Experts, measured from one recording of what enters their module.

An expert is a small MLP. Given the inputs of the module and the routing, in both streams, its
statistics need nothing else of the block: its own rows are the inputs that were routed to it, and
what its last layer gets is computed from them. So a block of a hundred experts takes one pass for
all of them, and memory for a few at a time.

A Hessian of fewer rows than half its columns says little, and less than that of other tokens: an
expert with n rows of K columns, n < K / 2, gets the means over its own rows and over all tokens of
the layer, weighted n to K / 2, and with fewer than 32 rows those over all tokens alone. Means over
the other experts' rows were no better than rounding for `down_proj`, whose inputs have another
basis in every expert."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.models.experts import DOWN, GATE, UP, Expert, Routed, Sorted, UnfusedExperts
from llmq.ptq.capture import Stop
from llmq.ptq.groups import InputGroup, Measured, Recording
from llmq.ptq.leaves import Leaves
from llmq.ptq.stats import LayerStats
from llmq.ptq.streams import Streams
from llmq.storage.hidden_states import ActivationFile
from llmq.storage.room import Room

WAVE_BYTES = 512_000_000  # of statistics that grow side by side
CHUNK_BYTES = 64_000_000  # of inputs, in float32
GROWING = 4  # sums beside each other while a tree of them grows: see `LayerStats`
SOLVED_TOGETHER = 8  # experts, by one process: another number in a solve may be other bits
FEW_ROWS = 32  # an expert with fewer is measured on all tokens of its layer alone


Groups = dict[int, InputGroup | None]  # of the experts of a wave, by number
# an expert's statistics over all tokens, for the process that owns them
Whole = Callable[[int, InputGroup, int], LayerStats | None]


def widest_input(expert: Expert) -> int:
    """The most columns that one of its layers has."""
    return max(expert.layer(part).in_features for part in (UP, DOWN))


def statistics_bytes(k: int, *, both: bool) -> int:
    """What statistics of inputs `[.., K]` take while they grow, at most."""
    return GROWING * 4 * k * k * (2 if both else 1)


def wave_size(k: int, *, both: bool) -> int:
    """How many experts are measured at a time. k: the most columns of a layer."""
    return max(1, WAVE_BYTES // statistics_bytes(k, both=both))


@dataclass
class RoutedStream:
    """What enters a module of experts, for all tokens of a stream. index, choices: the routing by
    chunk, which is as many batches of a leaf as `CHUNK_BYTES` of inputs allow: the rows that an
    expert gets of one batch are few, and adding them costs a pass over its statistics. per_leaf:
    how many chunks each leaf has. shape: of the inputs of one token `(S, K)`, known from the first
    batch on."""

    index: list[Tensor] = field(default_factory=list)
    per_leaf: list[int] = field(default_factory=list)
    # Found once: there are two passes over all chunks for every wave of experts.
    choices: list[Sorted] = field(default_factory=list)
    shape: tuple[int, int] = (0, 0)

    @contextmanager
    def recording(
        self, module: nn.Module, file: RoutedFile, leaves: Leaves, *, stop: bool = False
    ) -> Iterator[None]:
        """Keep what a module is called with. stop: end each call of the block there."""
        chosen: list[Tensor] = []
        append = None
        with ExitStack() as stack:

            def keep(module: UnfusedExperts, args: Any, kwargs: Any) -> None:
                nonlocal append
                routed = module.routed(*args, **kwargs)
                if append is None:
                    self.shape = (routed.x.shape[1], routed.x.shape[2])
                    append = stack.enter_context(file.rows(self.shape).appender(durable=False))
                append(routed.x.reshape(-1, file.length, self.shape[0] * self.shape[1]))
                chosen.append(routed.index.clamp(max=module.n_experts))
                if stop:
                    raise Stop

            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield
        self._gather(chosen, leaves, file.length)

    def _gather(self, chosen: list[Tensor], leaves: Leaves, length: int) -> None:
        """Routing by batch to routing by chunk."""
        n_bytes = 4 * leaves.batch_size * length * self.shape[0] * self.shape[1]
        step = max(1, CHUNK_BYTES // n_bytes)
        batches, chunks = iter(chosen), []
        for leaf in leaves.batches:
            own = list(itertools.islice(batches, len(leaf)))
            parts = [torch.cat(own[i : i + step]) for i in range(0, len(own), step)]
            self.per_leaf.append(len(parts))
            chunks += parts
        self.choices = [Sorted.of(chunk) for chunk in chunks]
        self.index = [chunk.to("cpu", torch.int16) for chunk in chunks]

    def chunks(self, file: RoutedFile, streams: Streams) -> Iterator[Routed]:
        """What was recorded, chunk by chunk, in float32."""
        sizes = [len(index) // file.length for index in self.index]
        rows = file.rows(self.shape).batches(sizes)
        for x, index, choices in zip(rows, self.index, self.choices, strict=True):
            inputs = x.to(streams.device, torch.float32).view(-1, *self.shape)
            yield Routed(inputs, index.to(streams.device, torch.int64), choices)


@dataclass(frozen=True)
class RoutedFile:
    """Where the inputs of a stream lie."""

    path: Path
    length: int
    dtype: torch.dtype
    room: Room

    def rows(self, shape: tuple[int, int]) -> ActivationFile:
        return ActivationFile(self.path, self.length, shape[0] * shape[1], self.dtype, self.room)

    def remove(self) -> None:
        """Give it up, where it is there."""
        self.rows((1, 1)).remove()


@dataclass
class Coverage:
    """How calibration text reached the experts of a module. name: of the module. n_tokens: of the
    text. n_rows: of each expert that is quantized, by number. blended, borrowed: those measured on
    all tokens beside their own rows, and on these alone."""

    name: str
    n_tokens: int = 0
    n_rows: dict[int, int] = field(default_factory=dict)
    blended: list[int] = field(default_factory=list)
    borrowed: list[int] = field(default_factory=list)

    def to_json(self, block: str) -> dict[str, Any]:
        """block: the name of the block that the module lies in."""
        rows = list(self.n_rows.values())
        return {
            "name": f"{block}.{self.name}",
            "n_tokens": self.n_tokens,
            "n_experts": len(rows),
            "min_rows": min(rows, default=0),
            "median_rows": median(rows) if rows else 0,
            "idle": [number for number, n in self.n_rows.items() if n == 0],
            "blended": {str(number): self.n_rows[number] for number in self.blended},
            "borrowed": {str(number): self.n_rows[number] for number in self.borrowed},
        }


class ExpertsStage:
    """The experts of one module. name: of it in its block. layers: those of experts that are
    quantized. exact: what enters it in the full-precision model. groups: none whose own rows are
    kept, since those of experts come from there."""

    groups: tuple[InputGroup, ...] = ()

    def __init__(self, name: str, layers: frozenset[str]) -> None:
        self.name, self.layers = name, layers
        self.exact = RoutedStream()
        self.coverage = Coverage(name)

    def recording_exact(self, streams: Streams, block: nn.Module) -> AbstractContextManager[None]:
        """While the full-precision stream runs through the block: keep what enters."""
        module = block.get_submodule(self.name)
        return self.exact.recording(module, self.file(streams, "exact"), streams.leaves)

    def measure(
        self, recording: Recording, streams: Streams, block: nn.Module, index: int
    ) -> Iterator[list[Measured]]:
        """One pass over the stream that ends where the experts begin; then, for some experts at a
        time, the statistics of the layers that read the inputs, and, once these are solved, of
        those behind them."""
        module = block.get_submodule(self.name)
        assert isinstance(module, UnfusedExperts)
        measuring = _Measuring(self, recording, streams, block, module)
        measuring.record(index)
        for wave in self._waves(module, recording):
            originals = {number: copy.deepcopy(module.expert(number)) for number in wave}
            yield measuring.inputs(wave)
            yield measuring.inner(originals)
        for what in ("own", "exact"):
            self.file(streams, what).remove()

    def group(self, number: int, parts: Sequence[str]) -> InputGroup | None:
        """Those of an expert's layers that are quantized."""
        names = [f"{self.name}.{number}.{part}" for part in parts]
        found = tuple(name for name in names if name in self.layers)
        return InputGroup(found) if found else None

    def file(self, streams: Streams, what: str) -> RoutedFile:
        """Of the inputs that are measured, "own", or of those that they are compared with,
        "exact", for which bfloat16 is enough, as for other layers."""
        dtype = torch.float32 if what == "own" else torch.bfloat16
        path = streams.work_dir / f"routed-{what}-{self.name}.bin"
        return RoutedFile(path, streams.length, dtype, streams.room)

    def _waves(self, module: UnfusedExperts, recording: Recording) -> Iterator[list[int]]:
        """Experts with layers to solve, so many at a time as memory is meant for."""
        below = (name.removeprefix(self.name + ".") for name in self.layers)
        numbers = sorted({int(name.partition(".")[0]) for name in below})
        step = wave_size(widest_input(module.expert(numbers[0])), both=recording.both)
        for start in range(0, len(numbers), step):
            yield numbers[start : start + step]


@dataclass
class _Measuring:
    """One stage while it is measured."""

    stage: ExpertsStage
    recording: Recording
    streams: Streams
    block: nn.Module
    module: UnfusedExperts
    quantized: RoutedStream = field(default_factory=RoutedStream)
    # over all tokens, of layers that read the inputs: the same for all experts
    whole: LayerStats | None = None

    def record(self, index: int) -> None:
        """Run the block up to the experts."""
        stream = self.recording.stream
        file = self.stage.file(self.streams, "own")
        recorded = self.quantized.recording(self.module, file, self.streams.leaves, stop=True)
        with self.recording.passing(), recorded:
            for call, hidden in self.streams.batches(index, stream):
                with suppress(Stop):
                    call.run(self.block, hidden)
        self.stage.coverage.n_tokens = self.streams.leaves.n_sequences * self.streams.length

    def inputs(self, wave: list[int]) -> list[Measured]:
        """Statistics of the layers that read the module's inputs."""
        groups = {number: self.stage.group(number, (GATE, UP)) for number in wave}
        stats, n_rows = self._empty(groups), dict.fromkeys(wave, 0)
        for x, y in self._pairs():
            for number, found in stats.items():
                rows, exact = x.share(number), None
                if y is not None:
                    exact = _paired(rows.x, *_matches(rows.tokens, y, number))
                _add(found, rows.x, exact)
            for number in wave:  # also of experts whose first layers are kept
                n_rows[number] += len(x.choices.expert(number)) if x.choices else 0
        self.stage.coverage.n_rows |= self._of_all(n_rows)
        return self._finished(groups, stats, self._whole_inputs)

    def inner(self, originals: dict[int, Expert]) -> list[Measured]:
        """Statistics of the layers behind them, which read what the solved ones give."""
        groups = {number: self.stage.group(number, (DOWN,)) for number in originals}
        stats = self._empty(groups)
        for x, y in self._pairs():
            for number, found in stats.items():
                rows, exact = x.share(number), None
                inner = self.module.inner(self.module.expert(number), rows.x)
                if y is not None:
                    places, values = _matches(rows.tokens, y, number)
                    values = self.module.inner(originals[number], values)
                    exact = _paired(inner, places, values)
                _add(found, inner, exact)

        def whole(number: int, group: InputGroup, owner: int) -> LayerStats | None:
            return self._whole_inner(number, group, originals[number], owner)

        return self._finished(groups, stats, whole)

    def _empty(self, groups: Groups) -> dict[int, LayerStats]:
        return {
            number: self._of_group(group) for number, group in groups.items() if group is not None
        }

    def _of_group(self, group: InputGroup) -> LayerStats:
        return self.recording.empty(self.streams, self.block, group, self.quantized.per_leaf)

    def _of_all(self, counts: dict[int, int]) -> dict[int, int]:
        """Sums over all processes."""
        everyones = self.recording.ranks.gathered(counts)
        return {number: sum(own[number] for own in everyones) for number in counts}

    def _finished(
        self, groups: Groups, stats: dict[int, LayerStats], whole: Whole
    ) -> list[Measured]:
        """The statistics of each expert, with those over all tokens where it has few rows. Experts
        of equal shapes cost the same, so the processes share them evenly."""
        n_rows = self._of_all({number: own.n_tokens for number, own in stats.items()})
        measured, numbers = [], list(stats)
        for count, start in enumerate(range(0, len(numbers), SOLVED_TOGETHER)):
            owner, found = count % self.recording.ranks.size, []
            for number in numbers[start : start + SOLVED_TOGETHER]:
                group = groups[number]
                assert group is not None
                own = stats.pop(number)
                stat = self._with_others(number, group, own, n_rows[number], whole, owner)
                found.append((group, stat))
            measured.append(Measured(owner, found))
        return measured

    def _with_others(
        self,
        number: int,
        group: InputGroup,
        own: LayerStats,
        n_rows: int,
        whole: Whole,
        owner: int,
    ) -> LayerStats | None:
        """An expert's statistics by how many rows it has."""
        coverage, enough = self.stage.coverage, own.k / 2
        if self.recording.all_experts:
            return whole(number, group, owner)
        if n_rows < FEW_ROWS:
            _note(coverage.borrowed, number)
            return whole(number, group, owner)
        found = self.recording.finished(own, owner)
        if n_rows >= enough:
            return found
        _note(coverage.blended, number)
        others = whole(number, group, owner)
        if found is None or others is None:
            return None
        return found.blend(others, n_rows / (n_rows + enough))

    def _whole_inputs(self, number: int, group: InputGroup, owner: int) -> LayerStats | None:
        empty, ranks = self._of_group(group), self.recording.ranks
        is_shared = empty.projection is None
        if not is_shared or self.whole is None:
            for x, y in self._pairs():
                _add(empty, x.rows, None if y is None else _same_choices(x, y))
            if not is_shared:
                return self.recording.finished(empty, owner)
            found = self.recording.finished(empty, 0)
            self.whole = ranks.broadcast(found)
        return copy.copy(self.whole) if ranks.rank == owner else None

    def _whole_inner(
        self, number: int, group: InputGroup, original: Expert, owner: int
    ) -> LayerStats | None:
        found = self._of_group(group)
        for x, y in self._pairs():
            inner = self.module.inner(self.module.expert(number), x.rows)
            exact = None
            if y is not None:
                exact = self.module.inner(original, _same_choices(x, y))
            _add(found, inner, exact)
        return self.recording.finished(found, owner)

    def _pairs(self) -> Iterator[tuple[Routed, Routed | None]]:
        """What enters in both streams, chunk by chunk."""
        quantized = self.quantized.chunks(self.stage.file(self.streams, "own"), self.streams)
        if not self.recording.both:
            yield from ((x, None) for x in quantized)
            return
        file = self.stage.file(self.streams, "exact")
        yield from zip(quantized, self.stage.exact.chunks(file, self.streams), strict=True)


def _matches(tokens: Tensor, exact: Routed, number: int) -> tuple[Tensor, Tensor]:
    """Which of an expert's tokens are sent to it in the full-precision model, too: their places
    among `tokens`, in ascending order, and what it gets of them there."""
    chosen = exact.places(number)
    if len(chosen) == 0 or len(tokens) == 0:
        return tokens[:0], exact.inputs(chosen[:0])
    theirs = chosen // exact.index.shape[1]
    found = torch.searchsorted(theirs, tokens).clamp_(max=len(theirs) - 1)
    places = (theirs[found] == tokens).nonzero()[:, 0]
    return places, exact.inputs(chosen[found[places]])


def _paired(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """The rows, with the full-precision model's where it has them: only these are corrected
    for."""
    return rows.index_copy(0, places, values)


def _same_choices(x: Routed, y: Routed) -> Tensor:
    """All inputs of the full-precision model. Where each choice of a token has its own, those of
    the same choice, else what the quantized model has there."""
    if x.x.shape[1] == 1:
        return y.rows
    return torch.where((x.index == y.index)[..., None], y.x, x.x).flatten(0, 1)


def _add(stats: LayerStats, rows: Tensor, exact: Tensor | None) -> None:
    """A chunk of inputs, and of the full-precision model's inputs, or what its layer makes of them
    where the statistics are of outputs."""
    if exact is not None and stats.projection is not None:
        exact = F.linear(exact, stats.projection)
    stats.add(rows, exact)


def _note(numbers: list[int], number: int) -> None:
    if number not in numbers:
        numbers.append(number)
