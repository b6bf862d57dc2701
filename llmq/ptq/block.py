"""One block on its way: its weights are loaded, its layers measured and solved, and it is run again
as it will be stored."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import linear_weight
from llmq.ptq.blocks import Blocks
from llmq.ptq.experts import ExpertsStage
from llmq.ptq.gathering import Gathering
from llmq.ptq.groups import InputGroup, Recording
from llmq.ptq.kept_outputs import KeptOutputs
from llmq.ptq.layers import LayerReport, better_of, by_spec, n_rows, report_layer, split
from llmq.ptq.memory import LARGE_BLOCK, release_freed_memory
from llmq.ptq.methods.base import BlockTuning, Method, Needs, SolvedBlock
from llmq.ptq.precision import Precision
from llmq.ptq.ranks import ONE, Ranks
from llmq.ptq.results import BlockReport, block_report
from llmq.ptq.solver import SolverResult
from llmq.ptq.stage import Stage, find_stages
from llmq.ptq.stats import LayerStats
from llmq.ptq.streams import Stream, Streams
from llmq.ptq.threads import total
from llmq.ptq.token_weights import TokenWeights
from llmq.ptq.transforms.apply import transform_block
from llmq.ptq.transforms.base import Transform
from llmq.recipe import LayerPlan, Recipe


@dataclass(frozen=True)
class Setup:
    """What is the same for all blocks of a run. transforms: what comes before the method, with text
    alone. plans: of every linear layer. streams: None for methods without text. precision: what the
    full-precision stream and tuning are computed in. special: where tokens are special ones, bool
    `[n_sequences, T]`, for tuning. token_weights: what tokens count, None where all count alike.
    ranks: the processes that share the work."""

    blocks: Blocks
    recipe: Recipe
    method: Method
    transforms: list[Transform]
    plans: list[LayerPlan]
    streams: Streams | None
    precision: Precision
    special: Tensor | None
    token_weights: TokenWeights | None = None
    ranks: Ranks = ONE

    @property
    def needs(self) -> Needs:
        return self.method.needs(self.recipe)

    @property
    def recording(self) -> Recording:
        stream: Stream = "quantized"
        if self.recipe.inputs == "full-precision":
            stream = "full-precision"
        is_static = self.recipe.activations.kind == "int8-static"
        return Recording(
            stream,
            self.needs.both_streams,
            is_static,
            self.recipe.all_experts,
            self.token_weights,
            self.ranks,
            is_needed=self.needs.text or is_static,
        )

    def targets(self, name: str) -> dict[str, QuantSpec]:
        """The layers of a block that are quantized, named as in the block."""
        prefix = name + "."
        return {
            plan.layer.name.removeprefix(prefix): plan.spec
            for plan in self.plans
            if plan.spec is not None and plan.layer.name.startswith(prefix)
        }

    def release_freed_memory(self) -> None:
        """Between solves. Beside a small block the holes are small and the 7 milliseconds are not:
        they were 2% of a run."""
        if self.blocks.n_bytes >= LARGE_BLOCK:
            release_freed_memory()


@dataclass(frozen=True)
class QuantizedBlock:
    """A block after the solve, in what is stored of it, and its outputs on the first batch, where
    there is text."""

    report: BlockReport
    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]
    first_output: Tensor | None


def quantize_block(setup: Setup, index: int) -> QuantizedBlock:
    """Load a block, quantize its layers, and run it as it will be stored."""
    work, kept = _opened(setup, index)
    name = work.name
    work.solve()
    kept = as_stored(work.module, kept)
    report, first_output = work.run_as_stored()
    return QuantizedBlock(
        report,
        {f"{name}.{layer}": result.tensor for layer, result in work.results.items()},
        {f"{name}.{key}": tensor for key, tensor in kept.items()},
        first_output,
    )


@dataclass(frozen=True)
class TransformedBlock:
    """A block in which scale has moved and nothing is rounded. changed: by the names of parameters,
    weights of layers that can be quantized in float32, everything else in the dtypes of the source.
    moved: what moved, see `Moved.to_json`."""

    changed: dict[str, Tensor]
    moved: list[dict[str, Any]]


def transform_alone(setup: Setup, index: int) -> TransformedBlock:
    """Load a block, move scale in it, and run it on."""
    work, kept = _opened(setup, index)
    assert isinstance(work, _Calibrated)
    work.find_stages()
    state = {**work.module.state_dict(), **as_stored(work.module, kept)}
    changed = {
        key: tensor.cpu() for key, tensor in state.items() if key.rpartition(".")[0] in work.moved
    }
    work.streams.advance(work.module, index, "quantized")
    return TransformedBlock(
        {f"{work.name}.{key}": tensor for key, tensor in changed.items()}, work.transforms
    )


def _opened(setup: Setup, index: int) -> tuple[_Rounded, dict[str, Tensor]]:
    """The block, with its weights, and those of its stored tensors that are not quantized."""
    stored = setup.blocks.read(index)
    module = setup.blocks.materialize(index, stored)
    name = setup.blocks.name(index)
    targets = setup.targets(name)
    kept = {
        key: tensor for key, tensor in stored.items() if key.removesuffix(".weight") not in targets
    }
    del stored
    if setup.streams is None:
        return _Rounded(setup, index, name, module, targets), kept
    dtypes = {key: tensor.dtype for key, tensor in kept.items()}
    work = _Calibrated(setup, index, name, module, targets, streams=setup.streams, dtypes=dtypes)
    return work, kept


@dataclass(frozen=True)
class _Part:
    """Layers that are solved as one, since they share their inputs' statistics and a spec."""

    layers: list[str]
    spec: QuantSpec
    stats: LayerStats | None


@dataclass(frozen=True)
class _Solved:
    """What became of a layer."""

    layer: str
    result: SolverResult
    report: LayerReport


class _Rounded:
    """A block whose layers are quantized without text."""

    def __init__(
        self,
        setup: Setup,
        index: int,
        name: str,
        module: nn.Module,
        targets: dict[str, QuantSpec],
    ) -> None:
        self.setup, self.index, self.name = setup, index, name
        self.module, self.targets = module, targets
        self.results: dict[str, SolverResult] = {}
        self.reports: list[LayerReport] = []

    def solve(self) -> None:
        """Quantize all layers, leaving the quantized values in the module."""
        for layer in self.targets:
            self._store(self._solve_groups([(InputGroup((layer,)), None)]))

    def run_as_stored(self) -> tuple[BlockReport, Tensor | None]:
        """The report, and the block's outputs on the first batch, where there is text."""
        return block_report(self.index, self.reports, None, None), None

    def _solve_groups(
        self, groups: Sequence[tuple[InputGroup, LayerStats | None]]
    ) -> list[_Solved]:
        """Solve groups of layers that do not depend on each other. Those of one shape and spec are
        handed to the method together."""
        parts = [
            _Part(layers, spec, stats)
            for group, stats in groups
            for layers, spec in by_spec(group.layers, self.targets)
        ]
        rows = [[n_rows(self.module, layer) for layer in part.layers] for part in parts]
        alike: dict[tuple[QuantSpec, int, int], list[int]] = {}
        for number, part in enumerate(parts):
            columns = self._weight(part.layers[0]).shape[1]
            alike.setdefault((part.spec, sum(rows[number]), columns), []).append(number)
        solved: dict[int, SolverResult] = {}
        for (spec, _, _), numbers in alike.items():
            weights = [self._stacked(parts[number].layers) for number in numbers]
            stats = [parts[number].stats for number in numbers]
            found = self.setup.method.solve_many(weights, stats, spec, self.setup.recipe)
            solved.update(zip(numbers, found, strict=True))
        taken = []
        for number, part in enumerate(parts):
            results = split(solved.pop(number), rows[number])
            for layer, result in zip(part.layers, results, strict=True):
                taken.append(self._taken(layer, result, part.stats))
        return taken

    def _stacked(self, layers: Sequence[str]) -> Tensor:
        """Their weights, one below the other."""
        weights = [self._weight(layer) for layer in layers]
        return torch.cat(weights) if len(weights) > 1 else weights[0]

    def _taken(self, layer: str, result: SolverResult, stats: LayerStats | None) -> _Solved:
        """A layer's result, unless plain rounding is better, and its report."""
        original = self._weight(layer)
        result = better_of(result, original)
        if stats is not None and stats.ranges is not None:
            found = stats.ranges.range(self.setup.recipe.activation_range)
            result = replace(result, tensor=replace(result.tensor, input_range=found))
        return _Solved(layer, result, report_layer(f"{self.name}.{layer}", original, result, stats))

    def _store(self, solved: Sequence[_Solved]) -> None:
        """Have the block compute with these."""
        for each in solved:
            self.results[each.layer] = each.result
            self.reports.append(each.report)
            self._weight(each.layer).copy_(each.result.tensor.dequantize())

    def _weight(self, layer: str) -> Tensor:
        return linear_weight(self.module.get_submodule(layer))


class _Calibrated(_Rounded):
    """A block whose layers are measured on both sides of what was solved before."""

    def __init__(
        self,
        setup: Setup,
        index: int,
        name: str,
        module: nn.Module,
        targets: dict[str, QuantSpec],
        *,
        streams: Streams,
        dtypes: dict[str, torch.dtype],
    ) -> None:
        super().__init__(setup, index, name, module, targets)
        self.streams, self.dtypes = streams, dtypes
        is_final = setup.recording.stream == "quantized" and not setup.transforms
        self.kept = KeptOutputs(streams, module, targets, is_final)
        self.tuning: BlockTuning | None = None
        self.exact_output: Tensor | None = None
        self.coverage: list[dict[str, Any]] = []
        self.transforms: list[dict[str, Any]] = []
        # What tuning starts from, and what the layers were solved with that this process solved.
        self.untuned: dict[str, Tensor] = {}
        self.stats: dict[str, LayerStats] = {}

    def solve(self) -> None:
        """Measure and solve stage by stage, then tune the whole, if the method does that."""
        for stage in self.find_stages():
            self._solve_stage(stage)
            if stage.coverage is not None:
                self.coverage.append(stage.coverage.to_json(self.name))
        if self.setup.needs.tuning and self.results:
            self._tune()

    def find_stages(self) -> list[Stage | ExpertsStage]:
        """The stages of the block, after its transforms."""
        stages = find_stages(self.streams, self.module, self.index, self.name, list(self.targets))
        if "full-precision" in self.streams.names:
            self.exact_output = self._run_exact(stages).float()
        return self._transformed(stages)

    @property
    def moved(self) -> set[str]:
        """Norms and layers whose weights transforms have changed."""
        pairs = [pair for moved in self.transforms for pair in moved["pairs"]]
        return {name for pair in pairs for name in (pair["giver"], *pair["takers"])}

    def run_as_stored(self) -> tuple[BlockReport, Tensor | None]:
        with self.kept.passing(is_last=True):
            output = self.streams.advance(self.module, self.index, "quantized")
        self.kept.forget()
        error = None
        if (exact := self.exact_output) is not None:
            error = total((output - exact).square()) / total(exact.square())
        report = block_report(self.index, self.reports, error, self.tuning)
        report = replace(report, experts=self.coverage, transforms=self.transforms)
        return report, output

    def _run_exact(self, stages: list[Stage | ExpertsStage]) -> Tensor:
        """Run the block before anything is solved, over the full-precision stream."""
        dtype = self.setup.precision.stream
        module = self.module
        if dtype != torch.float32:
            module = copy.deepcopy(module).to(dtype)
        if not self.setup.needs.both_streams:
            return self.streams.advance(module, self.index, "full-precision")
        record = [group.layers for stage in stages for group in stage.groups]
        with ExitStack() as stack:
            for stage in stages:
                stack.enter_context(stage.recording_exact(self.streams, module))
            return self.streams.advance(module, self.index, "full-precision", record)

    def _transformed(self, stages: list[Stage | ExpertsStage]) -> list[Stage | ExpertsStage]:
        """The stages of the block after its transforms."""
        for transform in self.setup.transforms:
            dense = [stage for stage in stages if isinstance(stage, Stage)]
            groups = [group.layers for stage in dense for group in stage.groups]
            moved = transform_block(
                transform, self.module, groups, self.streams, self.index, self.dtypes
            )
            stages = [stage.after(moved) if isinstance(stage, Stage) else stage for stage in stages]
            self.transforms.append(moved.to_json())
        return stages

    def _solve_stage(self, stage: Stage | ExpertsStage) -> None:
        recording = replace(self.setup.recording, passing=self.kept.passing)
        ranks = self.setup.ranks
        for runs in stage.measure(recording, self.streams, self.module, self.index):
            self.setup.release_freed_memory()
            own = {}
            for number, run in enumerate(runs):
                if run.owner == ranks.rank:
                    own[number] = self._solve_groups(run.groups)
                    for _, stats in run.groups:  # several groups may share them
                        if stats is not None:
                            stats.forget_cross()
            solved: dict[int, list[_Solved]] = {}
            for owner in dict.fromkeys(run.owner for run in runs):
                solved |= ranks.broadcast(own, owner)
            for number in range(len(runs)):
                self._store(solved[number])
                self.kept.solved.update(each.layer for each in solved[number])

    def _taken(self, layer: str, result: SolverResult, stats: LayerStats | None) -> _Solved:
        if self.setup.needs.tuning and stats is not None:
            self.stats[layer] = stats
        return super()._taken(layer, result, stats)

    def _store(self, solved: Sequence[_Solved]) -> None:
        if self.setup.needs.tuning:
            self.untuned |= {each.layer: self._weight(each.layer).clone() for each in solved}
        super()._store(solved)

    def _tune(self) -> None:
        """Results, weights and the reports of layers become those of the tuned ones."""
        self.kept.forget()
        ranks = self.setup.ranks
        tuning = self._tuned(Gathering(ranks, self.streams.leaves))
        self.tuning = tuning = ranks.broadcast(tuning)
        assert tuning is not None
        own = {}
        for layer, tensor in tuning.tensors.items():
            before = self.results[layer]
            self.results[layer] = result = replace(
                before,
                tensor=replace(tensor, input_range=before.tensor.input_range),
                errors=None,  # of the weights that tuning started from
                is_rounding=before.is_rounding and tuning.kept_start,
            )
            self._weight(layer).copy_(tensor.dequantize())
            if layer in self.stats:  # of the layers that this process has solved
                name, original = f"{self.name}.{layer}", self.untuned[layer]
                own[layer] = report_layer(name, original, result, self.stats[layer])
        reports: dict[str, LayerReport] = {}
        for found in ranks.gathered(own):
            reports |= found
        self.reports = [reports[layer] for layer in tuning.tensors]
        self.untuned.clear()
        self.stats.clear()

    def _tuned(self, gathering: Gathering) -> BlockTuning | None:
        """What the method makes of the block, in the first process."""
        setup, index = self.setup, self.index
        assert self.streams.calls is not None
        inputs = gathering.states(self.streams.inputs_of(index))
        targets = gathering.states(self.streams.inputs_of(index + 1, "full-precision"))
        call_of = self.streams.calls.gathered(index, gathering)
        if not gathering.ranks.is_first:
            return None
        block = SolvedBlock(
            self.module,
            self.untuned,
            {layer: result.tensor for layer, result in self.results.items()},
            inputs,
            targets,
            call_of,
            setup.special,
            setup.precision.training,
            (setup.recipe.seed * len(setup.blocks) + index) % (1 << 63),
        )
        tuning = setup.method.tune(block, setup.recipe)
        gathering.forget()
        return tuning


def as_stored(module: nn.Module, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kept tensors as they stand in the solved block, in the dtypes of the source. What a
    method has changed is rounded to its dtype in the block, too."""
    state = module.state_dict()
    result = {}
    for key, source in kept.items():
        current = state[key]
        result[key] = source
        if not torch.equal(current, source.to(current.device, current.dtype)):
            result[key] = current.to("cpu", source.dtype, copy=True)
            current.copy_(result[key])
    return result
