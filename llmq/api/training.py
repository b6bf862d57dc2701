"""`llmq.prepare_qat` with recipes and text in the forms that people have."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.api.recipes import RecipeLike, recipe_of
from llmq.api.texts import TextOrIds, windows_for
from llmq.arguments import check_type
from llmq.qat import prepare
from llmq.qat.weights import QuantizerName
from llmq.text.documents import TokenSet


def prepare_qat(
    model: PreTrainedModel,
    recipe: RecipeLike,
    calibration: TextOrIds | TokenSet | None = None,
    *,
    quantizer: QuantizerName = "lsq",
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: Tensor | None = None,
) -> PreTrainedModel:
    """Replace the linear layers of a float32 `model` by layers in training, in place, and return it
    (see `llmq.qat.prepare`). recipe, calibration, tokenizer: as for a model in memory in
    `llmq.quantize`. quantizer: see `llmq.qat.weights`. tokens: what `calibration` was called when
    it took nothing else. Raises `LlmqError` for recipes that cannot be trained (act-order)."""
    check_type("model", model, PreTrainedModel, "a transformers model in memory")
    chosen = recipe_of(recipe, model.config)
    given = tokens if calibration is None else calibration
    windows = windows_for(model, given, chosen, tokenizer)
    return prepare.prepare_qat(model, chosen, windows, quantizer=quantizer)
