"""What a job will need, from shapes alone: bytes on disk, peak memory, floating-point operations.
Estimates; what was measured is in the report."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from llmq.models.arch import find_blocks
from llmq.ptq.engine import batch_size
from llmq.ptq.methods.blockwise import sequences_per_step

if TYPE_CHECKING:
    from llmq.ptq.run import Job

_HEADERS = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}


def stored_bytes(job: Job) -> int:
    """Bytes of the weight files that the job writes."""
    source = sum(path.stat().st_size for path in set(job.shards.names.values()))
    element = source / max(
        1,
        sum(
            prod(parameter.shape)
            for name, parameter in job.model.named_parameters()
            if name not in job.model.all_tied_weights_keys
        ),
    )
    saved = sum(
        prod(plan.layer.shape) * (element - plan.spec.bits_per_weight(*plan.layer.shape) / 8)
        for plan in job.plans
        if plan.spec
    )
    return int(source - saved)


def work_bytes(job: Job) -> int:
    """Bytes of the files beside the output while the job runs: both streams' inputs of two blocks,
    what each layer reads (or, where that is less, gives) in the full-precision model, inputs and
    outputs of solved parts, and the per-layer embeddings of models that have them."""
    if job.tokens is None:
        return 0
    hidden = job.model.config.get_text_config().hidden_size
    text_config = job.model.config.get_text_config()
    per_layer = getattr(text_config, "hidden_size_per_layer_input", None) or 0
    first = _first_block(job)
    return job.tokens.n_tokens * (
        4 * per_layer * text_config.num_hidden_layers
        + 2 * 2 * 4 * hidden
        + sum(2 * min(shape) for shape in first)
        + 4 * (max(max(shape) for shape in first) + 2 * hidden)
    )


def peak_bytes(job: Job) -> int:
    """Peak resident memory above the loaded libraries: one float32 block (and its stored copy), and
    the larger of the embedding phase and the largest solve."""
    prefix, blocks = find_blocks(job.model)
    block = 6 * sum(prod(parameter.shape) for parameter in blocks[0].parameters())
    if job.tokens is None:
        return int(block * 1.5)
    shapes = [plan.layer.shape for plan in job.plans if plan.spec]
    # Hessian, its reordered copy, factor and inverse factor (rounding, which wants ranges only: the
    # first); then W, W^T, errors and codes of up to two stacked layers.
    squares = 4 if job.recipe.method == "rtn" else 16
    solve = max(squares * k * k + 2 * 13 * n * k for n, k in shapes)
    widest = max(max(shape) for shape in shapes)
    length = job.tokens.tokens.shape[1]
    batch = 4 * batch_size(job.plans, length) * length * widest * 4
    embedding = (
        4
        * sum(
            prod(p.shape)
            for name, p in job.model.named_parameters()
            if not name.startswith(prefix + ".")
        )
        * 2
    )
    return int(max(embedding, block + max(solve, _tuning_bytes(job)) + batch))


def _tuning_bytes(job: Job) -> int:
    """What block-wise tuning holds beside the block: the full-precision weights and Hessians, and
    of each weight a master, its gradient, two moments, its value and the value's gradient; and the
    activations of a step, about twelve of the widest kind."""
    if job.recipe.method != "blockwise" or job.tokens is None:
        return 0
    first = _first_block(job)
    n_sequences, length = job.tokens.tokens.shape
    step = (
        12
        * 4
        * sequences_per_step(n_sequences, length)
        * length
        * max(max(shape) for shape in first)
    )
    return 7 * 4 * sum(prod(shape) for shape in first) + 4 * sum(k * k for _, k in first) + step


def _first_block(job: Job) -> list[tuple[int, int]]:
    """Shapes of the quantized layers of the first block that has any."""
    planned = [plan.layer for plan in job.plans if plan.spec]
    prefix, _ = find_blocks(job.model)
    index = planned[0].name.removeprefix(prefix + ".").partition(".")[0]
    return [layer.shape for layer in planned if layer.name.startswith(f"{prefix}.{index}.")]


def flops(job: Job) -> float:
    """Floating-point operations of the job: four forward passes of each block, Hessians,
    factorizations, column updates and error reports."""
    if job.tokens is None:
        return float(50 * sum(prod(plan.layer.shape) for plan in job.plans))
    n_tokens = job.tokens.n_tokens
    forward = 4 * 2 * n_tokens * sum(prod(plan.layer.shape) for plan in job.plans)
    hessians = (
        sum(2 * n_tokens * plan.layer.shape[1] ** 2 for plan in job.plans if plan.spec) / 2
    )  # about half of the layers share an input
    if job.recipe.method == "rtn":  # measures the ranges of activations
        return float(forward + hessians)
    solves = sum(
        k**3 + 6 * n * k * k for n, k in (plan.layer.shape for plan in job.plans if plan.spec)
    )
    search = (
        sum(31 * 8 * prod(plan.layer.shape) for plan in job.plans if plan.spec) * 8
    )  # memory-bound: counted eightfold
    return float(forward + hessians + solves + search) + _tuning_flops(job)


def _tuning_flops(job: Job) -> float:
    """Three matmuls per weight and token of every step, doubled: attention, the quantizer and the
    optimizer take about as long on small blocks."""
    if job.recipe.method != "blockwise" or job.tokens is None:
        return 0.0
    n_sequences, length = job.tokens.tokens.shape
    n_tokens = job.recipe.iterations * sequences_per_step(n_sequences, length) * length
    return 2.0 * 3 * 2 * n_tokens * sum(prod(plan.layer.shape) for plan in job.plans)
