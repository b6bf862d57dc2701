"""The way from a loaded model to tokens, the same for the command line and for Python."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmq.inference.attention import use_decode_attention
from llmq.inference.cache import in_place_cache
from llmq.inference.fuse import fuse_shared_inputs
from llmq.inference.head import quantize_head
from llmq.inference.rotary import take_turns
from llmq.inference.settings import check, effective, takes_in_place_cache
from llmq.inference.step import step_of, use_recorded_steps
from llmq.models.compat import cache_name

_PREPARING = threading.Lock()


def prepare_decoding(model: PreTrainedModel, *, head_bits: int | None = None) -> PreTrainedModel:
    """Make `model` decode faster, in place: on a CPU quantized layers that read the same input are
    fused, attention has a kernel for the one new token, and where the family allows it a whole step
    is a recorded list of kernel calls. A model that is prepared stays as it is; from then on any
    number of threads can generate with it. head_bits: 8 or 4 to quantize the output head and the
    embeddings, too."""
    with _PREPARING:
        quantize_head(model, head_bits)
        take_turns(model)
        # Fusing runs the model with stand-ins for its layers, which no other thread may meet.
        if model.device.type == "cpu" and step_of(model) is None:
            fuse_shared_inputs(model)
            use_decode_attention(model)
            use_recorded_steps(model)
    return model


@torch.inference_mode()
def generate(model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Any:
    """transformers' own `generate` for `input_ids` `[B, T]`: the same tokens, `[B, T + new]`, or
    the object it returns where the settings ask for one. Where it would make its default cache, it
    gets one that is written in place. options: anything that `generate` takes; they go before the
    model's generation config. Raises `LlmqError` for settings that cannot work here."""
    settings = effective(model, options)
    check(settings, model.device.type, remote_code=options.get("custom_generate") is not None)
    if takes_in_place_cache(model, settings, options):
        n_tokens = input_ids.shape[1] + max_new_tokens
        options[cache_name()] = in_place_cache(model.config, n_tokens)
        if settings["cache_implementation"] == "dynamic":
            options["cache_implementation"] = None  # it is what this cache is, beside which it errs
    options["max_new_tokens"] = max_new_tokens
    return model.generate(input_ids, **options)  # type: ignore[operator]


def end_ids(eos: int | Sequence[int] | None) -> list[int]:
    """The tokens at which a text ends, of an `eos_token_id`."""
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def ending_also_at(stored: GenerationConfig, token: int | None) -> dict[str, Any]:
    """What to give `generate` for a text to end at one token more than its generation config has;
    None for none."""
    ends = end_ids(stored.eos_token_id)
    return {} if token is None else {"eos_token_id": [*ends, *({token} - set(ends))]}
