"""Quantized keys and values, for training and for inference by the same function.

By default they are quantized after the rotary embedding, on what the cache holds: an attention
function registered with transformers quantizes keys and values and hands over to SDPA, which works
for every family that uses transformers' attention interface. Quantizing an already quantized token
gives the same token (its largest magnitude stays the largest), so it does not matter that cached
ones pass by again. Before the rotary embedding is what LLM-QAT does; there hooks on `k_proj` and
`v_proj` quantize.

The arithmetic is that of an INT8 or INT4 cache, but the cache itself still holds 16 or 32 bits:
this measures what a quantized cache costs in quality; it does not yet save its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.grid.fakequant import straight_through
from llmq.inference.attention import replace_sdpa
from llmq.models.compat import sdpa_attention_forward

KV_BITS = (8, 4)


def fake_quantize_heads(x: Tensor, bits: int) -> Tensor:
    """x `[..., head_dim]` with every head of every token on a symmetric grid of `2^bits - 1`
    levels. Nothing is clipped, so the gradient is the identity."""
    values = x.detach().float()
    scale = values.abs().amax(dim=-1, keepdim=True).div_(2 ** (bits - 1) - 1).clamp_min_(1e-8)
    return straight_through(x, (values / scale).round_().mul_(scale).to(x.dtype))


def _attention(bits: int) -> Callable[..., Any]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        return sdpa_attention_forward(
            module,
            query,
            fake_quantize_heads(key, bits),
            fake_quantize_heads(value, bits),
            attention_mask,
            **kwargs,
        )

    return forward


def quantize_kv(model: PreTrainedModel, bits: int | None, *, before_rope: bool = False) -> None:
    """Quantize keys and values of every attention layer of `model`, in place. None: do nothing.
    Raises `LlmqError` for other bits and for models with an attention of their own."""
    if bits is None:
        return
    if bits not in KV_BITS:
        raise LlmqError(f"--kv-bits {bits}: expected 8 or 4")
    if before_rope:
        _quantize_projections(model, bits)
        return
    if not replace_sdpa(model, f"llmq_kv{bits}", _attention(bits)):
        raise LlmqError(
            f"{type(model).__name__} does not use transformers' SDPA attention, so its keys and "
            "values cannot be reached; leave out the kv part of the scheme, or quantize before "
            "RoPE"
        )


def _quantize_projections(model: PreTrainedModel, bits: int) -> None:
    found = [
        (module, getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", None))
        for name, module in model.named_modules()
        if name.endswith((".k_proj", ".v_proj"))
    ]
    if not found:
        raise LlmqError(
            f"{type(model).__name__} has no k_proj and v_proj; quantize keys and values after RoPE "
            "instead"
        )
    for module, width in found:  # by layer, since these may differ
        if width is None:
            raise LlmqError(
                f"{type(model).__name__}: its attention does not say how wide a head is; quantize "
                "keys and values after RoPE instead"
            )
        module.register_forward_hook(_rounding_heads(width, bits))


def _rounding_heads(width: int, bits: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return fake_quantize_heads(output.unflatten(-1, (-1, width)), bits).flatten(-2)

    return hook
