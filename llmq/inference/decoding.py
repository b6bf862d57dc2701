"""The way from a loaded model to tokens, the same for the command line and for Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.inference.attention import use_decode_attention
from llmq.inference.cache import in_place_cache
from llmq.inference.fuse import fuse_shared_inputs
from llmq.inference.head import quantize_head
from llmq.inference.step import use_recorded_steps


def prepare_decoding(model: PreTrainedModel, *, head_bits: int | None = None) -> PreTrainedModel:
    """Make `model` decode faster, in place: on a CPU quantized layers that read the same input are
    fused, attention has a kernel for the one new token, and where the family allows it a whole step
    is a recorded list of kernel calls. head_bits: 8 or 4 to quantize the output head and the
    embeddings, too."""
    quantize_head(model, head_bits)
    if model.device.type == "cpu":
        fuse_shared_inputs(model)
        use_decode_attention(model)
        use_recorded_steps(model)
    return model


@torch.inference_mode()
def generate(
    model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, **options: Any
) -> Tensor:
    """transformers' own `generate` for `input_ids` `[B, T]` with a cache that is written in place;
    returns `[B, T + new]`. options: anything that `generate` takes."""
    cache = in_place_cache(model.config, input_ids.shape[1] + max_new_tokens)
    output: Any = model.generate(
        input_ids, max_new_tokens=max_new_tokens, past_key_values=cache, **options
    )  # type: ignore[operator]
    return output
