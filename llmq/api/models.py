"""Models and tokenizers as arguments: in memory, or by a name."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.arguments import check_type, refused
from llmq.errors import LlmqError
from llmq.formats.load import load
from llmq.formats.save import source_folder
from llmq.models.arch import position_limit
from llmq.models.source import Source
from llmq.models.source import load_tokenizer as tokenizer_of_folder
from llmq.models.tokens import check_size, own_tokenizer

ModelName: TypeAlias = str | os.PathLike[str] | Source
ModelLike: TypeAlias = PreTrainedModel | ModelName
USUAL_LENGTH = 2048
NAME_FORMS = "a folder, a Hub id, or 'tiny'"
FORMS = f"a transformers model, or its name: {NAME_FORMS}"


def is_name(model: object) -> bool:
    """Whether an argument names a model rather than being one."""
    return isinstance(model, str | os.PathLike | Source)


def check_model(name: str, model: object) -> None:
    """Raise `LlmqError` for what is neither a model nor its name."""
    if not isinstance(model, PreTrainedModel) and not is_name(model):
        raise refused(name, model, FORMS)


def in_memory(name: str, model: ModelLike) -> PreTrainedModel:
    """The model itself; one that is named is loaded in float32, free of the kernels' rounding."""
    check_model(name, model)
    return model if isinstance(model, PreTrainedModel) else load(model, dtype="float32")


def config_of(model: ModelLike) -> Any:
    """The config of a model that is in memory or named."""
    check_model("model", model)
    return model.config if isinstance(model, PreTrainedModel) else Source.open(model).config


def usual_length(config: Any) -> int:
    """Tokens of a window where nothing else is asked: 2048, or what the model has positions
    for."""
    return min(USUAL_LENGTH, position_limit(config) or USUAL_LENGTH)


def load_tokenizer(model: ModelLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: of its folder, its Hub id or "tiny", or of the folder that a model
    in memory was loaded from. Raises `LlmqError` where there is none, or not the model's own."""
    check_model("model", model)
    if isinstance(model, Source):
        return own_tokenizer(model)
    if not isinstance(model, PreTrainedModel):
        return tokenizer_of_folder(Source.open(model).folder)
    folder = source_folder(model)
    if folder is None:
        raise LlmqError(
            f"tokenizer: this {type(model).__name__} was not loaded from a folder, so its own is "
            "not known; give tokenizer=llmq.load_tokenizer(FOLDER), or token ids for the text"
        )
    return own_tokenizer(Source(folder))


def tokenizer_for(
    model: ModelLike, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or else the model's."""
    if tokenizer is None:
        return load_tokenizer(model)
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a transformers tokenizer")
    check_size(tokenizer, config_of(model), "tokenizer")
    return tokenizer
