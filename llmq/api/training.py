"""`llmq.prepare_qat` with recipes and text in the forms that people have, and the learning rates of
what it prepared."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.api.recipes import RecipeLike, recipe_of
from llmq.api.texts import TextOrIds, windows_for
from llmq.arguments import check_type
from llmq.qat import prepare
from llmq.qat.rates import parameter_groups
from llmq.qat.weights import QuantizerName
from llmq.text.documents import TokenSet


def prepare_qat(
    model: PreTrainedModel,
    recipe: RecipeLike,
    calibration: TextOrIds | TokenSet | None = None,
    *,
    quantizer: QuantizerName = "lsq",
    lora_rank: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: Tensor | None = None,
) -> PreTrainedModel:
    """Replace the linear layers of a float32 `model` by layers in training, in place, and return it
    (see `llmq.qat.prepare`). recipe, calibration, tokenizer: as for a model in memory in
    `llmq.quantize`. quantizer: see `llmq.qat.weights`. lora_rank: train low-rank changes of the
    weights and the scales, instead of everything. tokens: what `calibration` was called when
    it took nothing else. Raises `LlmqError` for recipes that cannot be trained (act-order)."""
    check_type("model", model, PreTrainedModel, "a transformers model in memory")
    chosen = recipe_of(recipe, model.config)
    given = tokens if calibration is None else calibration
    windows = windows_for(model, given, chosen, tokenizer)
    return prepare.prepare_qat(model, chosen, windows, quantizer=quantizer, lora_rank=lora_rank)


def qat_parameter_groups(
    model: PreTrainedModel, *, lr_weights: float | None = None, lr_scales: float | None = None
) -> list[dict[str, Any]]:
    """Groups for any optimizer of what a model from `prepare_qat` trains, each with the learning
    rate that suits the grid of its layer and without decay (see `llmq.qat.rates`). lr_weights,
    lr_scales: absolute, in their place. Raises `LlmqError` for a model that was not prepared."""
    check_type("model", model, PreTrainedModel, "a transformers model in memory")
    return parameter_groups(model, lr_weights=lr_weights, lr_scales=lr_scales)
