"""From a model in memory to one in training, for training loops of one's own; `llmq.qat.run` does
the same from folder to folder.

recipe = llmq.Recipe.uniform("w3g64-asym")
llmq.prepare_qat(model, recipe, tokens)
...  # any training loop: parameters are float32 masters, scales and zero points
llmq.freeze(model, recipe.activations)  # packed layers with the very same values
llmq.save(model, "out", tokenizer=tokenizer)
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from llmq.activations.keys_values import quantize_kv
from llmq.inference.module import quantized_modules
from llmq.ptq.in_memory import device_of, quantize
from llmq.ptq.methods import split_name
from llmq.qat.smoothing import is_smoothed, smooth
from llmq.qat.weights import QuantizerName, prepare
from llmq.recipe import Recipe


def prepare_qat(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Tensor | None = None,
    *,
    quantizer: QuantizerName = "lsq",
    lora_rank: int | None = None,
) -> PreTrainedModel:
    """Replace the linear layers of a float32 `model` by layers in training, in place, and return
    it.

    recipe: what is quantized and how the start is found. tokens: calibration windows int64
    `[n_sequences, length]`, for methods other than "rtn" and for activations "int8-static". A copy
    of the model is quantized for the start, so memory for two is needed at that time. quantizer:
    see `llmq.qat.weights`. lora_rank: train a change of this rank of every weight, and the scales,
    instead of everything (see `llmq.qat.lora`). Raises `LlmqError` for recipes that cannot be
    trained (act-order)."""
    start_recipe = recipe
    if is_smoothed(recipe):
        smooth(model, recipe, tokens, device_of(model))
        start_recipe = replace(recipe, method=split_name(recipe.method)[1])
    start = copy.deepcopy(model)
    quantize(start, start_recipe, tokens)
    found = {name: module.qtensor() for name, module in quantized_modules(start).items()}
    del start
    prepare(model, found, quantizer, recipe.activations.kind, lora_rank=lora_rank, seed=recipe.seed)
    quantize_kv(model, recipe.activations.kv_bits, before_rope=recipe.activations.kv_before_rope)
    return model
