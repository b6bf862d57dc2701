"""Block by block: load one block, measure its layers' inputs, solve, run it again with quantized
weights, hand the result over, forget it.

Peak memory is one block in float32, its largest Hessian with the factorization, and one batch of
activations; depth does not enter. Inside a block layers are solved in the order in which they run
and see the repairs of those before ("true-sequential"); layers that read the same tensor share one
Hessian and are solved in one call with their rows stacked.

After each block the inputs of the next one lie on disk, so a run can start again at any block. A
block is handed over through `store`, as it stands after the solve, and comes back as it was stored:
the engine makes a new block of that alone, norms and kept layers included, compares its outputs bit
for bit, and only then lets `seal` make it count. The solved block is gone by then, so that
verifying takes no second one.

Two streams of hidden states run side by side: what the quantized model computes, always in float32,
and what the full-precision model computes, which tells each layer what was lost before it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.activations.ranges import RangeObserver
from llmq.errors import LlmqError, VerificationError
from llmq.evaluation.position_classes import is_special
from llmq.grid.spec import QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq.models.arch import find_blocks, linear_weight, weight_as_stored
from llmq.ptq import rebuild
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.block_check import check_blocks
from llmq.ptq.capture import BlockCall, BlockRecorder, run_and_record, run_until, shared_inputs
from llmq.ptq.layers import (
    LayerReport,
    better_of,
    by_spec,
    n_rows,
    report_layer,
    solve,
    split,
)
from llmq.ptq.memory import LARGE_BLOCK, map_large_tensors, release_freed_memory
from llmq.ptq.methods.blockwise import BlockTuning, BlockwiseOptions, ClassErrors, tune_block
from llmq.ptq.precision import Precision
from llmq.ptq.rebuild import FinishedBlocks
from llmq.ptq.replay import SolvedParts
from llmq.ptq.solver import SolverResult
from llmq.ptq.stats import LayerStats
from llmq.recipe import LayerPlan, Recipe
from llmq.storage.hidden_states import ActivationFile

# of one activation of the widest layer; larger batches leave the caches, cost memory and are no
# faster on a CPU
BATCH_BYTES = 4_000_000


class WeightReader(Protocol):
    """Where weights come from: stored copies by model parameter name, in their own dtype."""

    def read_parameters(self, names: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class BlockReport:
    """index, layers, seconds for the block; output_error: squared distance of the quantized block's
    outputs from the full-precision model's on the first batch, relative. start_error, tuned_error:
    mean over tokens of such a distance before and after block-wise tuning; n_skipped_steps: its
    steps without a finite loss or gradient; tuning_by_class: its errors by class of positions;
    tuning_worse_in: classes that it made worse, so that its start was kept."""

    index: int
    layers: list[LayerReport]
    seconds: float
    output_error: float | None = None
    start_error: float | None = None
    tuned_error: float | None = None
    n_skipped_steps: int = 0
    tuning_by_class: dict[str, ClassErrors] = field(default_factory=dict)
    tuning_worse_in: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BlockResult:
    """What `store` gets: quantized weights and kept tensors by full parameter or module name, and
    the report."""

    report: BlockReport
    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]


@dataclass(frozen=True)
class StoredBlock:
    """What `store` gives back: the same tensors, read from where they were stored."""

    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]


@dataclass(frozen=True)
class _Solved:
    """A block after the solve, in what is stored of it, and its outputs on the first batch."""

    report: BlockReport
    quantized: dict[str, QuantizedTensor]
    kept: dict[str, Tensor]
    first_output: Tensor | None


@dataclass
class Engine:
    """The state of one run. model: on the meta device. plans: every linear layer of the blocks.
    tokens: int64 `[n_sequences, length]`, or None for methods without data. store: stores a block's
    result and returns all of it as read back from there. seal: makes a stored and verified block
    count. on_block: told after each block. precision: what the full-precision stream and block-wise
    tuning are computed in. finished: blocks of an earlier run, where there can be any.
    special_ids: tokens whose positions block-wise tuning must not make worse, whatever it gains
    elsewhere."""

    model: PreTrainedModel
    reader: WeightReader
    recipe: Recipe
    plans: list[LayerPlan]
    tokens: Tensor | None
    work_dir: Path
    store: Callable[[BlockResult], StoredBlock]
    seal: Callable[[BlockReport], None]
    on_block: Callable[[BlockReport], None] = lambda report: None
    device: str = "cpu"
    precision: Precision = field(default_factory=Precision)
    finished: FinishedBlocks | None = None
    special_ids: frozenset[int] = frozenset()
    _calls: BlockCalls | None = None
    _untuned: dict[str, tuple[Tensor, LayerStats]] = field(
        default_factory=dict
    )  # full-precision weights of the block whose layers are solved, and what they were solved with

    def __post_init__(self) -> None:
        self.prefix, self.blocks = find_blocks(self.model)
        if self.tokens is None and self.recipe.needs_calibration:
            needing, remedy = (
                (f"method {self.recipe.method}", "--method rtn")
                if self.recipe.method != "rtn"
                else ("activations int8-static", "int8-token")
            )
            raise LlmqError(
                f"{needing} needs calibration text; give tokens (--calibration), or use {remedy}"
            )
        self.block_bytes = 4 * sum(parameter.numel() for parameter in self.blocks[0].parameters())
        self.batch_size = 1 if self.tokens is None else batch_size(self.plans, self.tokens.shape[1])

    # --- the way of the whole model -----------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, first_block: int = 0, damaged: Sequence[int] = ()) -> None:
        """Quantize all blocks from `first_block` on, and before these the damaged ones among the
        finished. Inputs that do not lie in `work_dir` as they were sealed are computed again from
        the blocks before."""
        torch.backends.cuda.matmul.allow_tf32 = False
        map_large_tensors(self.block_bytes)
        for index in rebuild.blocks_to_run(self, first_block, damaged):
            self._run_block(index)

    def inputs_of(self, index: int, stream: str = "quantized") -> ActivationFile:
        """The file of the inputs of block `index`."""
        assert self.tokens is not None
        width = self.model.config.get_text_config().hidden_size
        return ActivationFile(
            self.work_dir / f"inputs-{stream}-{index:05d}.bin",
            self.tokens.shape[1],
            width,
            self.precision.stream if stream == "full-precision" else torch.float32,
        )

    @property
    def _is_static(self) -> bool:
        return self.recipe.activations.kind == "int8-static"

    @property
    def streams(self) -> list[str]:
        one_is_enough = (
            not self.recipe.corrects_targets
            and self.recipe.inputs != "full-precision"
            and not self.tunes
        )
        return ["quantized"] if one_is_enough else ["quantized", "full-precision"]

    @property
    def tunes(self) -> bool:
        """Whether a block is tuned as a whole after its layers are solved."""
        return self.recipe.method == "blockwise"

    def _record_calls(self, first_block: int) -> None:
        """Record each block's own arguments and, at the start of a run, write the inputs of block 0
        and check that blocks run one by one are the model."""
        assert self.tokens is not None
        loaded = self._load_outside_blocks()
        recorder = BlockRecorder(self.model, self.blocks)
        batches = self.tokens.to(self.device).split(self.batch_size)
        with ExitStack() as stack:
            appenders = [
                stack.enter_context(self.inputs_of(0, stream).appender())
                for stream in (self.streams if first_block == 0 else ())
            ]

            def keep(hidden: Tensor) -> None:
                for append in appenders:
                    append(hidden)

            self._calls = BlockCalls.record(recorder, batches, self.work_dir, keep)
        if first_block == 0:
            self._check_blocks(self._calls)
        for name in loaded:
            set_module_tensor_to_device(self.model, name, "meta")

    def _check_blocks(self, calls: BlockCalls) -> None:
        """On the last sequence: arguments that belong to the first one only would show."""
        assert self.tokens is not None
        last = len(self.tokens) - 1
        check_blocks(
            self.model,
            self.blocks,
            self.tokens[last:].to(self.device),
            lambda index: self._materialize(index, self._read_block(f"{self.prefix}.{index}")),
            lambda index: calls.of(index)([last]),
        )

    def _load_outside_blocks(self) -> list[str]:
        """Give real float32 weights to everything that may run before block 0. The output head does
        not, and may be the largest tensor of all."""
        head = self.model.get_output_embeddings()
        tied = self.model.all_tied_weights_keys
        outside = [
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(self.prefix + ".")
            and name not in tied
            and not (head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head)
        ]
        for name, tensor in self.reader.read_parameters(outside).items():
            set_module_tensor_to_device(self.model, name, self.device, value=tensor.float())
        for name, buffer in self.model.named_buffers():
            if not name.startswith(self.prefix + "."):
                set_module_tensor_to_device(self.model, name, self.device, value=buffer)
        return outside

    # --- the way of one block -------------------------------------------------------------------------------------

    def _run_block(self, index: int) -> None:
        started = time.monotonic()
        name = f"{self.prefix}.{index}"
        solved = self._solve_and_run(index, name)  # the block itself is gone with that call
        self._release_freed_memory()
        report = replace(solved.report, seconds=time.monotonic() - started)
        read_back = self.store(BlockResult(report, solved.quantized, solved.kept))
        self._verify(index, name, solved, read_back)
        self.seal(report)
        if self.tokens is not None:
            for stream in self.streams:
                self.inputs_of(index, stream).recycle(self.inputs_of(index + 2, stream))
        if self._calls is not None:
            self._calls.forget(index)
        self.on_block(report)

    def _solve_and_run(self, index: int, name: str) -> _Solved:
        """Load a block, quantize its layers, and run it as it will be stored."""
        stored = self._read_block(name)
        block = self._materialize(index, stored)
        plans = {
            plan.layer.name.removeprefix(name + "."): plan
            for plan in self.plans
            if plan.layer.name.startswith(name + ".")
        }
        targets = {layer: plan.spec for layer, plan in plans.items() if plan.spec is not None}
        kept = {
            key: tensor
            for key, tensor in stored.items()
            if key.removesuffix(".weight") not in targets
        }

        del stored
        parts = self._solved_parts(block, targets)
        with nullcontext() if parts is None else parts.watching():
            groups = self._groups(index, block, name, targets)
        exact_output = None
        if "full-precision" in self.streams and self.tokens is not None:
            exact = (
                block
                if self.precision.stream == torch.float32
                else copy.deepcopy(block).to(self.precision.stream)
            )
            exact_output = self._advance(exact, index, "full-precision", groups).float()
            del exact
        results, layer_reports = self._solve_block(index, block, name, targets, groups, parts)
        tuning = None
        if self.tunes and parts is not None and results:
            parts.discard()  # its layers are about to change
            tuning, layer_reports = self._tune(index, block, name, results)
        kept, has_changed = _as_stored(block, kept)
        first_output = None
        if parts is not None:
            if has_changed:
                parts.discard()  # they were measured before the change
            with parts.playing(results):
                first_output = self._advance(block, index, "quantized")
            parts.discard()
        error = None
        if exact_output is not None and first_output is not None:
            error = float(
                (first_output - exact_output).square().sum() / exact_output.square().sum()
            )

        report = BlockReport(index, layer_reports, 0.0, error)
        if tuning is not None:
            report = replace(
                report,
                start_error=tuning.start_error,
                tuned_error=tuning.error,
                n_skipped_steps=tuning.n_skipped,
                tuning_by_class=tuning.by_class,
                tuning_worse_in=tuning.worse,
            )
        return _Solved(
            report,
            {f"{name}.{layer}": result.tensor for layer, result in results.items()},
            {f"{name}.{key}": tensor for key, tensor in kept.items()},
            first_output,
        )

    def _release_freed_memory(self) -> None:
        """Between solves. Beside a small block the holes are small and the 7 milliseconds are not:
        they were 2% of a run."""
        if self.block_bytes >= LARGE_BLOCK:
            release_freed_memory()

    def _read_block(self, name: str) -> dict[str, Tensor]:
        parameters = [key for key in self.model.state_dict() if key.startswith(name + ".")]
        return {
            key.removeprefix(name + "."): tensor
            for key, tensor in self.reader.read_parameters(parameters).items()
        }

    def _materialize(self, index: int, stored: dict[str, Tensor]) -> nn.Module:
        block = copy.deepcopy(self.blocks[index])
        block.load_state_dict(
            {key: tensor.to(self.device, torch.float32) for key, tensor in stored.items()},
            assign=True,
            strict=False,
        )
        return block.to(self.device)

    def _batches(self, index: int, stream: str) -> Iterator[tuple[BlockCall, Tensor]]:
        assert self._calls is not None
        inputs = self.inputs_of(index, stream)
        call_of, start = self._calls.of(index, inputs.dtype), 0
        for hidden in inputs.batches(self.batch_size):
            sequences = range(start, start + len(hidden))
            yield call_of(sequences), hidden.to(self.device)
            start += len(hidden)

    def _advance(
        self, block: nn.Module, index: int, stream: str, record: Sequence[list[str]] = ()
    ) -> Tensor:
        """Run the block over a stream, write the next block's inputs (none after the last) and the
        `_exact_rows` of recorded groups, and return the first batch's output."""
        groups = record if self.recipe.corrects_targets else ()
        recorded: tuple[dict[str, nn.Module], dict[str, nn.Module]] = ({}, {})
        for group in groups:
            recorded[_narrows(block, group)][group[0]] = block.get_submodule(group[0])
        first: Tensor | None = None
        with ExitStack() as stack:
            exact = {
                group[0]: stack.enter_context(
                    self._exact_rows(block, group).appender(durable=False)
                )
                for group in groups
            }
            is_last = index == len(self.blocks) - 1 and not (
                self.tunes and stream == "full-precision"
            )  # these are what the last block is tuned towards
            append = (
                None
                if is_last
                else stack.enter_context(self.inputs_of(index + 1, stream).appender())
            )
            for call, hidden in self._batches(index, stream):
                if is_last and not exact and first is not None:
                    break  # nobody reads the other outputs
                output, rows = run_and_record(block, *recorded, call, hidden)
                for layer, x in rows.items():
                    exact[layer](x)
                if append is not None:
                    append(output)
                first = output if first is None else first
        assert first is not None
        return first

    def _exact_rows(self, block: nn.Module, group: list[str]) -> ActivationFile:
        """The file of a group's inputs in the full-precision model, or of its only layer's outputs
        if there are fewer of these. Kept as bfloat16: what counts is a mean over all tokens."""
        assert self.tokens is not None
        n, k = linear_weight(block.get_submodule(group[0])).shape
        return ActivationFile(
            self.work_dir / f"exact-{group[0]}.bf16",
            self.tokens.shape[1],
            n if _narrows(block, group) else k,
            torch.bfloat16,
        )

    def _solve_block(
        self,
        index: int,
        block: nn.Module,
        name: str,
        targets: dict[str, QuantSpec],
        groups: list[list[str]],
        parts: SolvedParts | None,
    ) -> tuple[dict[str, SolverResult], list[LayerReport]]:
        """Quantize the target layers in running order, leaving the quantized values in the
        block."""
        results: dict[str, SolverResult] = {}
        reports: list[LayerReport] = []
        for group in groups:
            stats = None
            if parts is not None:
                stats = self._measure(index, block, group, parts, results)
                self._release_freed_memory()
            for layers, spec in by_spec(group, targets):
                weights = [linear_weight(block.get_submodule(layer)) for layer in layers]
                solved = solve(
                    torch.cat(weights) if len(weights) > 1 else weights[0], stats, spec, self.recipe
                )
                for layer, result in zip(
                    layers, split(solved, [n_rows(block, layer) for layer in layers]), strict=True
                ):
                    original = linear_weight(block.get_submodule(layer))
                    result = better_of(result, original)
                    if self.tunes and stats is not None:
                        self._untuned[layer] = original.clone(), stats
                    if stats is not None and stats.ranges is not None:
                        result = replace(
                            result,
                            tensor=replace(
                                result.tensor,
                                input_range=stats.ranges.range(self.recipe.activation_range),
                            ),
                        )
                    results[layer] = result
                    reports.append(report_layer(f"{name}.{layer}", original, result, stats))
                    original.copy_(result.tensor.dequantize())
            if stats is not None:
                stats.cross = (
                    None  # what outlives the solve, for reports on tuned layers, is the Hessian
                )
        return results, reports

    def _tune(
        self, index: int, block: nn.Module, name: str, results: dict[str, SolverResult]
    ) -> tuple[BlockTuning, list[LayerReport]]:
        """Tune the solved block as a whole: its results, its weights and the reports of its layers
        become those of the tuned ones."""
        assert self._calls is not None
        assert self.tokens is not None
        recipe, (untuned, self._untuned) = self.recipe, (self._untuned, {})
        seed = (recipe.seed * len(self.blocks) + index) % (1 << 63)
        options = BlockwiseOptions(
            recipe.iterations,
            recipe.learning_rate,
            recipe.tune_zero_points,
            self.precision.training == torch.bfloat16,
            seed,
        )
        weights, start = (
            {layer: weight for layer, (weight, _) in untuned.items()},
            {layer: result.tensor for layer, result in results.items()},
        )
        tuning = tune_block(
            block,
            weights,
            start,
            self.inputs_of(index),
            self.inputs_of(index + 1, "full-precision"),
            self._calls.of(index),
            options,
            is_special(self.tokens, self.special_ids),
        )
        reports = []
        for layer, tensor in tuning.tensors.items():
            results[layer] = replace(
                results[layer],
                tensor=replace(tensor, input_range=results[layer].tensor.input_range),
                errors=None,  # of the weights that tuning started from
                is_rounding=results[layer].is_rounding and tensor is start[layer],
            )
            linear_weight(block.get_submodule(layer)).copy_(tensor.dequantize())
            reports.append(
                report_layer(f"{name}.{layer}", weights[layer], results[layer], untuned[layer][1])
            )
        return tuning, reports

    def _solved_parts(self, block: nn.Module, targets: Collection[str]) -> SolvedParts | None:
        return (
            None
            if self.tokens is None
            else SolvedParts(
                block,
                targets,
                self.work_dir,
                self.tokens.shape[1],
                self.batch_size,
                enabled=self.recipe.inputs != "full-precision",
            )
        )

    def _groups(
        self, index: int, block: nn.Module, name: str, targets: dict[str, QuantSpec]
    ) -> list[list[str]]:
        if self.tokens is None or not targets:
            return [[layer] for layer in targets]
        call, hidden = next(self._batches(index, "quantized"))
        groups = shared_inputs(
            block, {layer: block.get_submodule(layer) for layer in targets}, call, hidden
        )
        idle = set(targets) - {layer for group in groups for layer in group}
        if idle:
            raise LlmqError(
                f"{name}.{min(idle)}: this layer did not run on the calibration text, so it cannot "
                f"be calibrated; keep it with --rule '*{min(idle)}=keep'"
            )
        return groups

    def _measure(
        self,
        index: int,
        block: nn.Module,
        group: list[str],
        parts: SolvedParts,
        solved: Collection[str],
    ) -> LayerStats:
        """Statistics of the inputs that a group of layers shares, on the stream that the recipe
        names."""
        layer = block.get_submodule(group[0])
        both = self.recipe.corrects_targets
        weight = linear_weight(layer)
        stats = LayerStats(
            weight.shape[1],
            self.device,
            cross=both,
            projection=weight if both and _narrows(block, group) else None,
            ranges=RangeObserver() if self._is_static else None,
        )
        exact_file = self._exact_rows(block, group)
        exact_batches = exact_file.batches(self.batch_size) if both else itertools.repeat(None)
        stream = "full-precision" if self.recipe.inputs == "full-precision" else "quantized"
        with parts.playing(solved), parts.keeping(group[0]) as keep:
            for (call, hidden), exact in zip(
                self._batches(index, stream), exact_batches, strict=False
            ):
                x = run_until(block, layer, call, hidden)
                stats.add(x, None if exact is None else exact.to(self.device))
                keep(x)
        stats.finish()
        exact_file.recycle()
        return stats

    def _verify(self, index: int, name: str, solved: _Solved, read_back: StoredBlock) -> None:
        """The stored block must be the block that was computed: same values in every tensor, and
        the same outputs on the first batch from a block made of what was stored alone."""
        for kind, there, written in (
            ("quantized layers", read_back.quantized, solved.quantized),
            ("kept tensors", read_back.kept, solved.kept),
        ):
            if there.keys() != written.keys():
                raise VerificationError(
                    f"{name}: {len(there)} {kind} were read back, {len(written)} were written; the "
                    "output is not usable"
                )
        tensors = {}
        for key, kept in read_back.kept.items():
            if kept.dtype != solved.kept[key].dtype or not torch.equal(kept, solved.kept[key]):
                raise VerificationError(
                    f"{key}: the tensor read back differs from the one written; the disk or the "
                    "memory is faulty"
                )
            tensors[key.removeprefix(name + ".")] = kept
        for layer, tensor in read_back.quantized.items():
            values = tensor.to(self.device).dequantize()
            if not torch.equal(values, solved.quantized[layer].to(self.device).dequantize()):
                raise VerificationError(
                    f"{layer}: the weight read back differs from the weight written; the disk or "
                    "the memory is faulty"
                )
            if solved.first_output is not None:
                module = self.model.get_submodule(layer)
                tensors[f"{layer.removeprefix(name + '.')}.weight"] = weight_as_stored(
                    module, values
                ).contiguous()
        if solved.first_output is None:
            return
        block = self._materialize(index, tensors)
        del tensors
        call, hidden = next(self._batches(index, "quantized"))
        if not torch.equal(call.run(block, hidden), solved.first_output):
            raise VerificationError(
                f"{name}: a block made of what was stored does not reproduce the outputs recorded "
                "when it was quantized"
            )


def _as_stored(block: nn.Module, kept: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The kept tensors as they stand in the solved block, in the dtypes of the source, and whether
    a method has changed any: that is rounded to its dtype in the block, too."""
    state = block.state_dict()
    result, has_changed = {}, False
    for key, source in kept.items():
        current = state[key]
        result[key] = source
        if not torch.equal(current, source.to(current.device, current.dtype)):
            result[key] = current.to("cpu", source.dtype, copy=True)
            current.copy_(result[key])
            has_changed = True
    return result, has_changed


def _narrows(block: nn.Module, group: list[str]) -> bool:
    """Whether a group is a single layer with fewer outputs than inputs."""
    n, k = linear_weight(block.get_submodule(group[0])).shape
    return len(group) == 1 and n < k


def batch_size(plans: list[LayerPlan], length: int) -> int:
    """Sequences of `length` tokens that run through a block at a time."""
    widest = max(max(plan.layer.shape) for plan in plans)
    return max(1, BATCH_BYTES // (4 * widest * length))
