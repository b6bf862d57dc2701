"""What a job will need, from shapes alone: bytes on disk, peak memory, floating-point operations.
Estimates; what was measured is in the report."""

from __future__ import annotations

from math import prod
from typing import Any

from transformers import PretrainedConfig

from llmq.models import compat
from llmq.models.arch import find_blocks, tower_parameters
from llmq.models.experts import DOWN, UP, choices_of, module_of, token_shares, unfused_in
from llmq.models.site import sites_in
from llmq.ptq.batches import BATCH
from llmq.ptq.experts import CHUNK_BYTES, GROWING, statistics_bytes, wave_size, widest_input
from llmq.ptq.head import HEAD_VALUES
from llmq.ptq.job import Job
from llmq.ptq.kept_outputs import kept_bytes as solved_bytes
from llmq.ptq.methods import method_of, split_name
from llmq.ptq.methods.base import Windows
from llmq.ptq.methods.blockwise import sequences_per_step
from llmq.ptq.parts import element_bytes, parts
from llmq.ptq.streams import batch_size
from llmq.ptq.token_weights import kept_bytes, sequences_at_once
from llmq.recipe import Layer, LayerPlan
from llmq.storage.packing import MAX_SHARD_BYTES
from llmq.text.documents import SELF, TokenSet

PASSES = 2.5  # of every token through a block, what solved parts give being kept
# Against the rate that a run is planned with, half of that of one large product (llmq/ptq/README.md
# has the figures): passes run faster, what goes column by column slower.
SEARCH_FLOPS = 350  # for each weight of embeddings and head, whose scales are searched
TEXT_FACTOR, SOLVE_FACTOR, WRITE_FACTOR = 0.45, 5.0, 1.5


def stored_bytes(job: Job) -> int:
    """Bytes of the weight files that the job writes."""
    return int(sum(part.planned_bytes for part in parts(job)))


def disk_bytes(job: Job) -> int:
    """Bytes that the output and the folder beside it take at their largest: while blocks are
    solved, or while they are put together, when one shard more is there."""
    stored = stored_bytes(job)
    return stored + max(work_bytes(job), min(stored, MAX_SHARD_BYTES))


def room_bytes(job: Job, max_ram: int | None) -> int:
    """What is left of the memory that a run may take, beside what it needs."""
    return 0 if max_ram is None else max(0, max_ram - peak_bytes(job))


def work_bytes(job: Job) -> int:
    """Bytes of the files beside the output while the job runs: both streams' inputs of two blocks,
    what each layer reads (or, where that is less, gives) in the full-precision model, what solved
    parts give, what enters experts in both streams, the per-layer embeddings of models that have
    them, the masks of windows with pictures, what enters and leaves both models where scales are
    trained, and what a part of the text leaves before all blocks where tokens have weights."""
    if job.tokens is None:
        return 0
    hidden = job.model.config.get_text_config().hidden_size
    text_config = job.model.config.get_text_config()
    per_layer = getattr(text_config, "hidden_size_per_layer_input", None) or 0
    experts = unfused_in(job.model)
    dense = [layer for layer in _first_block(job) if module_of(layer.name) not in experts]
    # what windows with pictures may attend to, for each of two kinds of layers
    masks = 2 * job.tokens.tokens.shape[1] if job.tokens.pictures else 0
    solved = solved_bytes([layer.shape[0] for layer in dense], job.tokens.n_tokens)
    return (
        _token_weight_files(job)
        + solved
        + job.tokens.n_tokens
        * (
            masks
            + 4 * per_layer * text_config.num_hidden_layers
            + 2 * 2 * 4 * hidden
            + sum(2 * min(layer.shape) for layer in dense)
            + ((4 + 2) * hidden if experts else 0)
            + (3 * 4 * hidden if job.recipe.scale_steps else 0)
        )
    )


def _token_weight_files(job: Job) -> int:
    """Bytes on disk while it is measured what tokens count."""
    assert job.tokens is not None
    if job.recipe.token_weights == "equal":
        return 0
    (n_sequences, length), config = job.tokens.tokens.shape, job.model.config.get_text_config()
    width, n_blocks = config.hidden_size, config.num_hidden_layers
    at_once = min(n_sequences, sequences_at_once(length, width, n_blocks))
    return kept_bytes(at_once * length, width, n_blocks)


def peak_bytes(job: Job) -> int:
    """Peak resident memory above the loaded libraries: the largest of recording what the blocks are
    called with (embeddings in float32, beside what they were read as), the largest float32 block
    (and its stored copy) with its largest solve, and writing embeddings and head."""
    _, blocks = find_blocks(job.model)
    block = 6 * max(
        sum(prod(parameter.shape) for parameter in each.parameters()) for each in blocks
    )
    outside = _outside(job)
    writing = 2 * element_bytes(job) * sum(outside.values())  # once more as bytes of the file
    if job.tokens is None:
        return int(max(block * 1.5, writing))
    head = job.model.get_output_embeddings()
    # towers are there where windows have pictures
    unread = set() if job.tokens.pictures else tower_parameters(job.model)
    n_before = sum(
        n
        for name, n in outside.items()
        if job.model.get_submodule(_module(name)) is not head and name not in unread
    )
    recording = (4 + element_bytes(job)) * n_before
    method, windows = method_of(job.recipe), _windows(job.tokens)
    shapes = [plan.layer.shape for plan in job.plans if plan.spec]
    solve = max(method.solve_bytes(shape) for shape in shapes)
    tuning = method.tuning_bytes([layer.shape for layer in _first_block(job)], windows)
    widest = max(max(shape) for shape in shapes)
    length = windows.length
    batch = 4 * batch_size(job.plans, length) * length * widest * 4
    # which writes its text as a whole, in what it is stored in or float32
    own_text = 2 * job.source.decoded_bytes if job.tokens.source == SELF else 0
    solve = max(solve, _experts_bytes(job))
    solving = block + max(solve, tuning) + batch
    gradients = max(_scale_tuning_bytes(job, block), _token_weight_bytes(job, block))
    return int(max(recording, solving, writing, own_text, gradients))


def _scale_tuning_bytes(job: Job, block: int) -> int:
    """Of training the scales of all blocks: the packed blocks, a master with its gradient and
    moments for each scale, the inputs of all blocks for the sequences of a step, what lies outside
    of the blocks in either model with its head, and one block with its gradients and
    activations."""
    assert job.tokens is not None
    if not job.recipe.scale_steps:
        return 0
    windows, text_config = _windows(job.tokens), job.model.config.get_text_config()
    n_tokens = sequences_per_step(windows.n_sequences, windows.length) * windows.length
    specs = [(plan.layer.shape, plan.spec) for plan in job.plans if plan.spec]
    packed = sum(n * k * spec.bits_per_weight(n, k) / 8 for (n, k), spec in specs)
    masters = 16 * sum(n * spec.n_groups(k) for (n, k), spec in specs)
    states = 4 * n_tokens * text_config.hidden_size * (text_config.num_hidden_layers + 1)
    widest = max(max(shape) for shape, _ in specs)
    running = 2 * block + 12 * 4 * n_tokens * widest
    return int(packed + masters + states + running + _head_bytes(job, n_models=2))


def _token_weight_bytes(job: Job, block: int) -> int:
    """Of measuring what tokens count: what lies outside of the blocks with the head, and one block
    with the activations of a batch."""
    assert job.tokens is not None
    if job.recipe.token_weights == "equal":
        return 0
    widest = max(max(plan.layer.shape) for plan in job.plans if plan.spec)
    n_tokens = BATCH * job.tokens.tokens.shape[1]
    return 2 * block + 12 * 4 * n_tokens * widest + _head_bytes(job, n_models=1)


def _head_bytes(job: Job, n_models: int) -> int:
    """What lies outside of the blocks, in float32 and once more as it is multiplied with, and the
    copies of the logits of some positions."""
    return 6 * n_models * sum(_outside(job).values()) + 6 * 4 * HEAD_VALUES


def _experts_bytes(job: Job) -> int:
    """Of the experts that are measured and solved at a time: copies of them as they were, and
    statistics, while these grow or beside the layers that are solved side by side."""
    modules = unfused_in(job.model)
    quantized = {module_of(plan.layer.name) for plan in job.plans if plan.spec}
    found = [module for name, module in modules.items() if name in quantized]
    if not found:
        return 0
    method = method_of(job.recipe)
    both = method.needs(job.recipe).both_streams
    expert = found[0].expert(0)
    k = widest_input(expert)
    n_experts = min(found[0].n_experts, wave_size(k, both=both))
    growing = n_experts * statistics_bytes(k, both=both)
    inner = expert.layer(DOWN).in_features
    n_before = sum(site.shape[0] for site in sites_in(expert)) - expert.layer(DOWN).out_features
    # What reads the inputs is solved as one layer.
    shapes = [(n_before, expert.layer(UP).in_features), (expert.layer(DOWN).out_features, inner)]
    together = max(method.together_bytes(shape, n_experts) for shape in shapes)
    originals = n_experts * 4 * sum(prod(parameter.shape) for parameter in expert.parameters())
    assert job.tokens is not None
    # a chunk of both streams, and of it what an expert gets
    rows = 3 * min(CHUNK_BYTES, 4 * expert.layer(UP).in_features * job.tokens.n_tokens)
    return originals + rows + max(growing, growing // GROWING + together)


def _outside(job: Job) -> dict[str, int]:
    """Weights of every parameter that is in no block, tied ones once."""
    prefix, _ = find_blocks(job.model)
    ties = compat.ties(job.model)
    return {
        name: prod(parameter.shape)
        for name, parameter in job.model.named_parameters()
        if not name.startswith(prefix + ".") and name not in ties
    }


def _module(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _windows(tokens: TokenSet) -> Windows:
    return Windows(*tokens.tokens.shape)


def _first_block(job: Job) -> list[Layer]:
    """The quantized layers of the first block that has any."""
    planned = [plan.layer for plan in job.plans if plan.spec]
    prefix, _ = find_blocks(job.model)
    index = planned[0].name.removeprefix(prefix + ".").partition(".")[0]
    return [layer for layer in planned if layer.name.startswith(f"{prefix}.{index}.")]


def _attention_widths(job: Job) -> int:
    """Channels of all query heads together, of all blocks."""
    return sum(map(_attention_width, compat.layer_configs(job.model.config.get_text_config())))


def _attention_width(config: PretrainedConfig) -> int:
    head = getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None)
    return int(heads * head) if head and heads else int(config.hidden_size)


def flops(job: Job) -> float:
    """Floating-point operations of the job, weighed by how fast they run: forward passes of each
    block, attention included, Hessians, factorizations, column updates and error reports."""
    tables = float(SEARCH_FLOPS * sum(prod(plan.layer.shape) for plan in job.outside))
    if job.tokens is None:
        return tables + 50 * sum(prod(plan.layer.shape) for plan in job.plans)
    n_tokens = job.tokens.n_tokens
    attention = 2 * job.tokens.tokens.shape[1] * _attention_widths(job)
    shares = token_shares(job.model)
    weights = sum(prod(plan.layer.shape) * _share(plan, shares) for plan in job.plans)
    n_passes = PASSES + len(split_name(job.recipe.method)[0])  # each transform measures, too
    forward = n_passes * 2 * n_tokens * (weights + attention)
    # about half of the layers share an input
    squares = (plan.layer.shape[1] ** 2 * _share(plan, shares) for plan in job.plans if plan.spec)
    hessians = 2 * n_tokens * sum(squares) / 2
    method = method_of(job.recipe)
    solves = sum(method.solve_flops(plan.layer.shape) for plan in job.plans if plan.spec)
    trained = _scale_tuning_flops(job, weights) + _token_weight_flops(job, weights)
    # windows that are held out run through the source and through the result
    n_held_out = sum(text.tokens.numel() for text in job.tokens.held_out)
    measured = 2 * 2 * n_held_out * weights
    passes = TEXT_FACTOR * (forward + hessians + measured + trained)
    passes += tuning_flops(job)
    return float(passes + SOLVE_FACTOR * solves + WRITE_FACTOR * _writing(job)) + tables


def tuning_flops(job: Job) -> float:
    """The part of it that is block-wise tuning."""
    if job.tokens is None:
        return 0.0
    layers = [plan.layer.shape for plan in job.plans]
    return TEXT_FACTOR * method_of(job.recipe).tuning_flops(
        layers, _windows(job.tokens), job.recipe
    )


def _scale_tuning_flops(job: Job, weights: float) -> float:
    """Of training the scales of all blocks: each step runs twice forward and back, by inputs and
    by weights; the heads of both models run beside."""
    assert job.tokens is not None
    windows, recipe = _windows(job.tokens), job.recipe
    if not recipe.scale_steps:
        return 0.0
    n_tokens = sequences_per_step(windows.n_sequences, windows.length) * windows.length
    head = job.model.get_output_embeddings()
    n_head = 0 if head is None else head.weight.numel()
    once = 2.0 * windows.n_sequences * windows.length * weights
    return once + 2.0 * recipe.scale_steps * n_tokens * (4 * weights + 3 * n_head)


def _token_weight_flops(job: Job, weights: float) -> float:
    """Of one pass forward and one back, by inputs alone, for which blocks run once more; and of the
    head, of which only the gradient of its inputs is wanted, too."""
    assert job.tokens is not None
    if job.recipe.token_weights == "equal":
        return 0.0
    head = job.model.get_output_embeddings()
    n_head = 0 if head is None else head.weight.numel()
    return 2.0 * job.tokens.n_tokens * (3 * weights + 2 * n_head)


def expected_coverage(job: Job) -> dict[str, Any] | None:
    """How many calibration tokens an expert gets where all get equally many, and how many it takes
    for statistics of its own; None for models without experts."""
    modules = unfused_in(job.model)
    if not modules:
        return None
    module = next(iter(modules.values()))
    choices = choices_of(job.model.config.get_text_config())
    n_tokens = None if job.tokens is None else job.tokens.n_tokens
    rows = None
    if choices is not None and n_tokens is not None:
        rows = n_tokens * choices // module.n_experts
    return {
        "n_layers": len(modules),
        "n_experts": module.n_experts,
        "n_chosen": choices,
        "tokens": n_tokens,
        "expected_rows": rows,
        "enough_rows": max(site.shape[1] for site in sites_in(module.expert(0))) // 2,
    }


def _share(plan: LayerPlan, shares: dict[str, float]) -> float:
    """The share of all tokens that a layer multiplies."""
    return shares.get(module_of(plan.layer.name), 1.0)


def _writing(job: Job) -> float:
    """Operations of the model while it writes its own calibration text."""
    assert job.tokens is not None
    if job.tokens.source != SELF:
        return 0.0
    shares = token_shares(job.model)
    n_weights = sum(prod(plan.layer.shape) * _share(plan, shares) for plan in job.plans)
    head = job.model.get_output_embeddings()
    n_weights += 0 if head is None else head.weight.numel()
    return float(2 * job.tokens.n_tokens * n_weights)
