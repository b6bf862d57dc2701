"""Load a source of few bits with transformers: its tensors are decoded here, for transformers has
no FP8 without a GPU, takes blocks that end before their last row for others, and needs packages."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmq.models.source import Source, meta_model


def load_decoded(
    source: Source, config: PretrainedConfig, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in full precision, and what transformers found while it loaded. config: of this
    load. dtype: of the model, "auto" as the config says."""
    skeleton = meta_model(config)
    if type(skeleton.config) is not type(config):  # a wrapper, of which this is the text model
        config = config.get_text_config()
    model, info = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=source.decoded.read(source.decoded.names),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.name_or_path = model.config._name_or_path = str(source.folder)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model, info
