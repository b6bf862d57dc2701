"""The on-disk formats by name, and the choice among them."""

from __future__ import annotations

from llmq.errors import LlmqError
from llmq.formats.base import Format, Specs
from llmq.formats.bitnet import BITNET
from llmq.formats.gptq import GPTQ_V1, GPTQ_V2, engines_load, fused_disagreement
from llmq.formats.native import NATIVE
from llmq.grid.spec import ActSpec
from llmq.recipe import LayerPlan

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (GPTQ_V1, GPTQ_V2, BITNET, NATIVE)}

_TOKENS = ActSpec("int8-token")

__all__ = ["FORMATS", "Format", "Specs", "choose_format", "format_note"]


def choose_format(name: str, plans: list[LayerPlan], activations: ActSpec = ActSpec()) -> Format:
    """The format by name; "auto" takes `gptq` or `bitnet` when it holds every layer exactly and
    other engines load it, else `llmq`. Raises `LlmqError` when the named one cannot hold a
    layer."""
    quantized = [(plan.layer, plan.spec) for plan in plans if plan.spec is not None]
    if name == "bitnet" and activations != _TOKENS:
        raise LlmqError(
            "format bitnet implies activations of 8 bits per token (--activations int8-token), "
            f"not {activations}. Use --format llmq, which holds everything"
        )
    if not activations.is_none and name not in ("auto", "llmq", "bitnet"):
        raise LlmqError(
            f"format {name} cannot say that activations are quantized ({activations}). Use "
            "--format llmq, which holds everything"
        )
    if name == "auto":
        fits = (
            activations.is_none
            and format_note(GPTQ_V1, plans) is None
            and all(
                GPTQ_V1.refusal(spec, layer.shape) is None and engines_load(spec)
                for layer, spec in quantized
            )
        )
        is_bitnet = activations == _TOKENS and all(
            BITNET.refusal(spec, layer.shape) is None for layer, spec in quantized
        )
        return GPTQ_V1 if fits else BITNET if is_bitnet else NATIVE
    if name not in FORMATS:
        raise LlmqError(f"format {name!r}: expected auto or one of {', '.join(FORMATS)}")
    fmt = FORMATS[name]
    for layer, spec in quantized:
        if reason := fmt.refusal(spec, layer.shape):
            raise LlmqError(
                f"format {name} cannot hold {layer.name} ({spec}): {reason}. Use --format llmq, "
                "which holds everything"
            )
    return fmt


def format_note(fmt: Format, plans: list[LayerPlan]) -> str | None:
    """Why other engines will not load a folder of a format that is meant for them, as far as the
    layers decide it, or None."""
    if (
        fmt not in (GPTQ_V1, GPTQ_V2)
        or (reason := fused_disagreement((plan.layer.name, plan.spec) for plan in plans)) is None
    ):
        return None
    return f"llmq loads this folder, vLLM and SGLang will not: {reason}"
