"""Attention of the one new token of a decoding step by llmq's own kernel; everything else goes to
transformers' SDPA function, as before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from llmq.models import compat
from llmq.models.compat import AttentionMaskInterface, sdpa_attention_forward, sdpa_mask
from llmq_kernels.compiled import decoding

NAME = "llmq_decode"
# What some families add to attention and the kernel does not have.
_UNUSUAL = ("softcap", "s_aux", "sinks", "position_bias")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Query `[B, H, M, D]`, key and value `[B, H_kv, T, D]` to `[B, M, H, D]`, as transformers'
    attention functions do."""
    is_plain = (
        attention_mask is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(kwargs.get(name) is not None for name in _UNUSUAL)
    )
    if not is_plain or decoding.attention_refusal(query, key, value) is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    out = decoding.attention(
        query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return out.transpose(1, 2), None


def use_decode_attention(model: PreTrainedModel) -> bool:
    """Have the attention layers of `model` use the kernel, in place. False, and nothing is changed,
    where they do not use transformers' SDPA."""
    return replace_sdpa(model, NAME, attention_forward)


def replace_sdpa(model: PreTrainedModel, name: str, forward: Any) -> bool:
    """Register an attention function that takes SDPA's masks and have every SDPA layer of `model`
    use it. False where the model does not use SDPA."""
    if compat.attention_name(model.config.get_text_config()) != compat.SDPA:
        return False
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    configs = {
        id(config): config
        for config in (
            model.config.get_text_config(),
            *(getattr(module, "config", None) for module in model.modules()),
        )
        if config is not None
    }
    for config in configs.values():
        if compat.attention_name(config) == compat.SDPA:
            compat.set_attention_name(config, name)
    return True
