"""What a job will need, from shapes alone: bytes on disk, peak memory, floating-point operations.
Estimates; what was measured is in the report."""

from __future__ import annotations

from math import prod

from llmq.models import compat
from llmq.models.arch import find_blocks
from llmq.ptq.job import Job
from llmq.ptq.methods import method_of
from llmq.ptq.methods.base import Windows
from llmq.ptq.streams import batch_size
from llmq.text.documents import SELF, TokenSet


def stored_bytes(job: Job) -> int:
    """Bytes of the weight files that the job writes."""
    source = job.source.weight_bytes
    element = source / max(
        1,
        sum(
            prod(parameter.shape)
            for name, parameter in job.model.named_parameters()
            if name not in compat.ties(job.model)
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
    method, windows = method_of(job.recipe), _windows(job.tokens)
    shapes = [plan.layer.shape for plan in job.plans if plan.spec]
    solve = max(method.solve_bytes(shape) for shape in shapes)
    tuning = method.tuning_bytes(_first_block(job), windows)
    widest = max(max(shape) for shape in shapes)
    length = windows.length
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
    # which writes its text as a whole, in what it is stored in or float32
    own_text = 2 * job.source.weight_bytes if job.tokens.source == SELF else 0
    return int(max(embedding, block + max(solve, tuning) + batch, own_text))


def _windows(tokens: TokenSet) -> Windows:
    return Windows(*tokens.tokens.shape)


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
    method = method_of(job.recipe)
    layers = [plan.layer.shape for plan in job.plans]
    solves = sum(method.solve_flops(plan.layer.shape) for plan in job.plans if plan.spec)
    tuning = method.tuning_flops(layers, _windows(job.tokens), job.recipe)
    # windows that are held out run through the source and through the result
    n_held_out = sum(text.tokens.numel() for text in job.tokens.held_out)
    measured = 2 * 2 * n_held_out * sum(prod(plan.layer.shape) for plan in job.plans)
    return float(forward + hessians + solves + measured) + tuning
