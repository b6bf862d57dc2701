"""Models and tokenizers as arguments: in memory, or by a name."""

from __future__ import annotations

import os
from typing import TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.arguments import check_type, refused
from llmq.errors import LlmqError
from llmq.formats.load import load
from llmq.formats.save import source_folder
from llmq.models.source import Source
from llmq.models.tokens import check_size, own_tokenizer

ModelName: TypeAlias = str | os.PathLike[str] | Source
ModelLike: TypeAlias = PreTrainedModel | ModelName
NAME_FORMS = "a folder, a Hub id, a .gguf file, or 'tiny'"
FORMS = f"a transformers model, or its name: {NAME_FORMS}"


def is_name(model: object) -> bool:
    """Whether an argument names a model rather than being one."""
    return isinstance(model, str | os.PathLike | Source)


def opened(name: str, model: ModelLike) -> PreTrainedModel | Source:
    """The model itself, or where it is named what is stored of it, opened once for all that is
    asked of it. Raises `LlmqError` for what is neither."""
    if isinstance(model, PreTrainedModel):
        return model
    if not is_name(model):
        raise refused(name, model, FORMS)
    return Source.open(model)


def in_memory(model: PreTrainedModel | Source) -> PreTrainedModel:
    """The model itself; a stored one is loaded in float32, free of the kernels' rounding."""
    return model if isinstance(model, PreTrainedModel) else load(model, dtype="float32")


def load_tokenizer(model: ModelLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: of its folder, its Hub id or "tiny", or of the folder that a model
    in memory was loaded from. Raises `LlmqError` where there is none, or not the model's own."""
    model = opened("model", model)
    if isinstance(model, Source):
        return own_tokenizer(model)
    folder = source_folder(model)
    if folder is None:
        raise LlmqError(
            f"tokenizer: this {type(model).__name__} was not loaded from a folder, so its own is "
            "not known; give tokenizer=llmq.load_tokenizer(FOLDER), or token ids for the text"
        )
    return own_tokenizer(Source(folder))


def tokenizer_for(
    model: PreTrainedModel | Source, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or else the model's."""
    if tokenizer is None:
        return load_tokenizer(model)
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a transformers tokenizer")
    check_size(tokenizer, model.config, "tokenizer")
    return tokenizer
