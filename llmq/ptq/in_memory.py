"""Quantize a model that is in memory."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.activations.keys_values import quantize_kv
from llmq.errors import LlmqError, LlmqWarning
from llmq.evaluation.position_classes import special_ids
from llmq.formats.hf_quantizer import state_quantization
from llmq.grid.tensor import QuantizedTensor
from llmq.inference.embedding import swap_tables
from llmq.inference.module import quantized_modules
from llmq.models.arch import quantizable_layers
from llmq.models.experts import unfuse
from llmq.models.readers import ModelReader, weight_reader
from llmq.models.shards import check_finite
from llmq.models.source import meta_model
from llmq.models.stored import state_ties
from llmq.ptq.engine import Task, quantize_blocks
from llmq.ptq.methods import method_of, needs_text
from llmq.ptq.outside import OutsideReader, fitting_outside, plan_outside, quantize_table
from llmq.ptq.precision import Precision
from llmq.ptq.results import BlockReport
from llmq.ptq.scales import fitting_plans
from llmq.ptq.sink import ModelSink
from llmq.recipe import LayerPlan, Recipe
from llmq.text import documents

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def device_of(model: PreTrainedModel) -> str:
    """Where a model in memory is quantized: on its device, or on the CPU if it is spread over
    several. Raises `LlmqError` for weights that are not in memory."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if away := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise LlmqError(
            f"{away[0]} has no data in memory, nor have {len(away) - 1} others (offloaded, or on "
            "the meta device); load the model without offloading, or quantize its folder: llmq "
            "quantize MODEL OUT"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else "cpu"


def _without_scale_steps(recipe: Recipe) -> Recipe:
    """Warn where the method trains scales of its own accord. Raises `LlmqError` where it was asked
    to."""
    if not recipe.scale_steps:
        return recipe
    reason = (
        f"{recipe.scale_steps} scale steps: scales are trained against the full-precision model, "
        "which a model in memory is no more once its blocks are quantized"
    )
    remedy = "quantize its folder: llmq.quantize(folder, out, ...)"
    if not recipe.is_default("scale_steps"):
        raise LlmqError(f"{reason}; {remedy}")
    warnings.warn(
        f"{reason}, so method {recipe.method} goes without; for what they gain {remedy}",
        LlmqWarning,
        stacklevel=3,
    )
    return replace(recipe, scale_steps=0)


def _check_source(model: PreTrainedModel) -> None:
    """Raise `LlmqError` for a model that is no full-precision one with finite weights."""
    if quantized_modules(model):
        raise LlmqError(
            f"this {type(model).__name__} is quantized already; start from the full-precision model"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in REAL:
            raise LlmqError(
                f"tensor {name} is {parameter.dtype}, expected {', '.join(map(str, REAL))}: start "
                "from the full-precision model"
            )
    for name, tensor in model.state_dict().items():
        check_finite(f"tensor {name}", tensor)


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> list[BlockReport]:
    """Quantize a model in memory, in place, and return the report of each block. Every layer stays
    on its device; a model that is on one device is quantized there, another on the CPU.

    tokens: calibration windows int64 `[n, length]` (see `llmq.text.documents.calibration_windows`);
    not needed for method "rtn". Raises `LlmqError` for bad input."""
    method_of(recipe)  # or it is refused before anything changes
    recipe = _without_scale_steps(recipe)
    device = device_of(model)
    _check_source(model)
    skeleton = meta_model(model.config, type(model))
    plans = recipe.plan(quantizable_layers(skeleton))
    unfuse(model)
    reader = ModelReader(model)
    if tokens is not None:
        documents.check_windows(tokens, model.config.get_text_config().vocab_size)
    plans, changed = fitting_plans(plans, weight_reader(skeleton, reader))
    outside = fitting_outside(
        plan_outside(model, recipe), lambda name: model.get_submodule(name).weight.detach()
    )
    if changed:
        note = next(plan.note for plan in plans if plan.layer.name == changed[0])
        warnings.warn(
            f"{len(changed)} layers differ from what was asked, the first being {changed[0]}: "
            f"{note}",
            LlmqWarning,
            stacklevel=2,
        )
    activations = recipe.activations
    quantize_kv(
        meta_model(model.config, type(model)),
        activations.kv_bits,
        before_rope=activations.kv_before_rope,
    )  # whether it can be done is known before anything changes
    tables = _quantized_tables(model, outside)
    sink = ModelSink(model, recipe.activations)
    task = Task(
        skeleton,
        reader,
        recipe,
        plans,
        tokens if needs_text(recipe) else None,
        device,
        Precision.of(model.config, recipe, device),
        special_ids(model.config),
        OutsideReader(reader, lambda: tables) if tables else None,
    )
    with tempfile.TemporaryDirectory(prefix="llmq-") as work_dir:
        quantize_blocks(task, sink, Path(work_dir), on_block=on_block)
    quantize_kv(model, activations.kv_bits, before_rope=activations.kv_before_rope)
    swap_tables(model, {plan.role: tables[plan.layer.name] for plan in outside})
    state_ties(model)
    state_quantization(model)
    return sink.reports


def _quantized_tables(
    model: PreTrainedModel, outside: list[LayerPlan]
) -> dict[str, QuantizedTensor]:
    """Embeddings and head, rounded, by name of module."""
    found = {}
    for plan in outside:
        assert plan.spec is not None
        weight = model.get_submodule(plan.layer.name).weight.detach()
        found[plan.layer.name] = quantize_table(weight, plan.spec)
    return found
