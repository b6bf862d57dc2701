"""Block by block: load one block, measure its layers' inputs, solve, run it again with quantized
weights, hand the result over, forget it.

Peak memory is one block in float32, its largest Hessian with the factorization, and one batch of
activations; depth does not enter.

After each block the inputs of the next one lie on disk, so a run can start again at any block. A
block is handed over to the sink, as it stands after the solve, and comes back as it was stored:
a new block is made of that alone, norms and kept layers included, its outputs are compared bit for
bit, and only then it is sealed and counts. The solved block is gone by then, so that verifying
takes no second one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.evaluation.position_classes import is_special
from llmq.models.experts import unfused_in
from llmq.models.readers import WeightReader
from llmq.ptq.batches import Batches
from llmq.ptq.block import Setup, TransformedBlock, quantize_block, transform_alone
from llmq.ptq.block_calls import BlockCalls
from llmq.ptq.block_check import check_blocks
from llmq.ptq.blocks import Blocks
from llmq.ptq.capture import BlockRecorder, CannotRunAloneError
from llmq.ptq.leaves import Leaves
from llmq.ptq.memory import map_large_tensors
from llmq.ptq.methods import method_of, needs_text, split_name
from llmq.ptq.methods.base import Needs
from llmq.ptq.outside import as_stored
from llmq.ptq.precision import Precision
from llmq.ptq.ranks import ONE, Ranks
from llmq.ptq.rebuild import Rebuild
from llmq.ptq.results import BlockReport, BlockResult, EarlierRun, Sink
from llmq.ptq.streams import Stream, Streams, batch_size
from llmq.ptq.token_weights import TokenWeights
from llmq.ptq.transforms import transform_named
from llmq.ptq.verify import verify_block
from llmq.recipe import LayerPlan, Recipe
from llmq.storage.room import Room
from llmq.text.picture_windows import PictureInputs

OnStep = Callable[[str, int, int], None]
"""Told what is done beside blocks, how many steps of it are, and of how many."""


@dataclass(frozen=True)
class Task:
    """What is to be quantized. model: on the meta device. plans: every linear layer of the blocks.
    tokens: int64 `[n_sequences, T]`, or None for methods without text. precision: what the
    full-precision stream and block-wise tuning are computed in. special_ids: tokens whose positions
    tuning must not make worse, whatever it gains elsewhere. outside: embeddings and head as they
    will be stored, where these are quantized. pictures: what the sequences hold beside tokens.
    ranks: the processes that share the work, each with all of this. room: memory that hidden states
    may lie in."""

    model: PreTrainedModel
    reader: WeightReader
    recipe: Recipe
    plans: list[LayerPlan]
    tokens: Tensor | None
    device: str
    precision: Precision
    special_ids: frozenset[int] = frozenset()
    outside: WeightReader | None = None
    pictures: PictureInputs | None = None
    ranks: Ranks = ONE
    room: Room = field(default_factory=Room)


@torch.no_grad()
def quantize_blocks(
    task: Task,
    sink: Sink,
    work_dir: Path,
    *,
    earlier: EarlierRun | None = None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    on_step: OnStep = lambda what, done, total: None,
) -> None:
    """Quantize all blocks that an earlier run has not finished, the damaged ones first. Inputs that
    do not lie in `work_dir` as they were sealed are computed again from the blocks before.
    on_block: told after each block. on_step: told before of what else takes its time."""
    torch.backends.cuda.matmul.allow_tf32 = False
    setup = prepare_setup(task, work_dir)
    map_large_tensors(setup.blocks.n_bytes)
    rebuild = Rebuild(setup, earlier)
    if setup.token_weights is not None and rebuild.start is not None:
        _measure_tokens(setup, setup.token_weights, task, on_step)
    if setup.streams is not None and rebuild.start is not None:
        with _explaining(setup.streams):
            _record_calls(setup.blocks, setup.streams, rebuild.start, task.outside)
    for index in rebuild.blocks_to_run():
        on_block(_run_block(setup, sink, index))


@torch.no_grad()
def transform_blocks(task: Task, work_dir: Path) -> Iterator[TransformedBlock]:
    """Move scale in all blocks, by the transforms of the recipe, and round nothing: for what is
    trained afterwards. The recipe's method is not looked at."""
    setup = prepare_setup(task, work_dir)
    streams = setup.streams
    assert streams is not None
    _record_calls(setup.blocks, streams, 0, None)
    for index in range(len(setup.blocks)):
        yield transform_alone(setup, index)
        _forget(streams, index)


def _forget(streams: Streams, index: int) -> None:
    """Give up what a finished block was run with."""
    streams.recycle(index)
    assert streams.calls is not None
    streams.calls.forget(index)


def prepare_setup(task: Task, work_dir: Path) -> Setup:
    """The parts that all blocks have in common. Raises `LlmqError` where text is missing."""
    method = method_of(task.recipe)
    needs = method.needs(task.recipe)
    if task.tokens is None and needs_text(task.recipe):
        needing, remedy = (
            (f"method {task.recipe.method}", "--method rtn")
            if needs.text or "+" in task.recipe.method
            else ("activations int8-static", "int8-token")
        )
        raise LlmqError(
            f"{needing} needs calibration text; give a list of texts or token ids "
            f"(--calibration), or use {remedy}"
        )
    blocks = Blocks(task.model, task.reader, task.device)
    streams = special = None
    if task.tokens is not None:
        streams = _streams(task, needs, len(blocks), work_dir)
        special = is_special(task.tokens, task.special_ids)
    names, _ = split_name(task.recipe.method)
    transforms = [transform_named(name) for name in names]
    weights = None
    if task.recipe.token_weights == "fisher":
        weights = TokenWeights(work_dir / "token-weights", task.ranks)
    return Setup(
        *(blocks, task.recipe, method, transforms, task.plans, streams, task.precision),
        *(special, weights, task.ranks),
    )


def _measure_tokens(setup: Setup, weights: TokenWeights, task: Task, on_step: OnStep) -> None:
    """What tokens count, for all layers but those of experts."""
    assert setup.streams is not None
    layers = {}
    for index in range(len(setup.blocks)):
        experts = tuple(f"{name}." for name in unfused_in(setup.blocks.modules[index]))
        targets = setup.targets(setup.blocks.name(index))
        layers[index] = [name for name in targets if not name.startswith(experts)]
    layers = {index: names for index, names in layers.items() if names}
    weights.measure(
        setup.blocks,
        setup.streams.tokens,
        setup.streams.leaves,
        layers,
        task.recipe.seed,
        lambda done, total: on_step("token weights", done, total),
        task.precision.gradients,
    )


def _streams(task: Task, needs: Needs, n_blocks: int, work_dir: Path) -> Streams:
    assert task.tokens is not None
    wants_exact = needs.both_streams or needs.tuning or task.recipe.inputs == "full-precision"
    names: list[Stream] = ["quantized", "full-precision"] if wants_exact else ["quantized"]
    # what the last block gives in full precision is what it is tuned towards
    last: dict[Stream, int] = {
        "quantized": n_blocks - 1,
        "full-precision": n_blocks if needs.tuning else n_blocks - 1,
    }
    leaves = Leaves(
        len(task.tokens),
        batch_size(task.plans, task.tokens.shape[1]),
        task.ranks.rank,
        task.ranks.size,
    )
    own = leaves.sequences
    return Streams(
        names,
        {"quantized": torch.float32, "full-precision": task.precision.stream},
        last,
        task.tokens[own.start : own.stop],
        task.model.config.get_text_config().hidden_size,
        leaves,
        work_dir,
        task.device,
        task.pictures,
        room=task.room,
    )


def _record_calls(
    blocks: Blocks, streams: Streams, first_block: int, outside: WeightReader | None
) -> None:
    """Record each block's own arguments and, at the start of a run, write the inputs of block 0 and
    check that blocks run one by one are the model."""
    recorder = BlockRecorder(blocks.model, blocks.modules)
    batches, with_towers = streams.model_inputs, streams.pictures is not None
    names = streams.names if first_block == 0 else []
    if outside is not None and "quantized" in names:
        _write_quantized_inputs(as_stored(blocks, outside), streams, batches)
        names = [name for name in names if name != "quantized"]
    with blocks.with_weights_outside(with_towers=with_towers):
        with ExitStack() as stack:
            appenders = [
                stack.enter_context(streams.inputs_of(0, stream).appender()) for stream in names
            ]

            def keep(hidden: Tensor) -> None:
                for append in appenders:
                    append(hidden)

            streams.calls = BlockCalls.record(recorder, batches, streams.work_dir, keep)
        if first_block == 0:
            _check_blocks(blocks, streams, streams.calls)


@contextmanager
def _explaining(streams: Streams) -> Iterator[None]:
    """Some models add what they see to the hidden states between blocks, too (Qwen3-VL)."""
    try:
        yield
    except CannotRunAloneError as error:
        if streams.pictures is None:
            raise
        raise error.with_pictures() from error


def _write_quantized_inputs(blocks: Blocks, streams: Streams, batches: Batches) -> None:
    """The inputs of block 0 behind embeddings that are quantized, too."""
    recorder = BlockRecorder(blocks.model, blocks.modules)
    with_towers = streams.pictures is not None
    with (
        blocks.with_weights_outside(with_towers=with_towers),
        streams.inputs_of(0, "quantized").appender() as append,
    ):
        for batch in batches:
            append(recorder.run(**batch)[0])


def _check_blocks(blocks: Blocks, streams: Streams, calls: BlockCalls) -> None:
    """On the last sequence: arguments that belong to the first one only would show."""
    last = len(streams.tokens) - 1
    check_blocks(
        blocks.model,
        blocks.modules,
        streams.model_inputs.of([last]),
        blocks.load,
        lambda index: calls.of(index)([last]),
    )


def _run_block(setup: Setup, sink: Sink, index: int) -> BlockReport:
    """Quantize a block, store it, verify it, seal it."""
    started = time.monotonic()
    solved = quantize_block(setup, index)  # the block itself is gone with that call
    setup.release_freed_memory()
    report = replace(solved.report, seconds=time.monotonic() - started)
    read_back = sink.store(BlockResult(report, solved.quantized, solved.kept))
    verify_block(setup.blocks, setup.streams, index, solved, read_back)
    sink.seal(report)
    if setup.streams is not None:
        _forget(setup.streams, index)
    return report
