"""Load a quantized folder, whoever wrote it, or a full-precision one, and check that nothing in it
was made up."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmq.errors import LlmqError
from llmq.formats import hf_quantizer
from llmq.inference.rotary import take_turns
from llmq.models.building import one_at_a_time
from llmq.models.shards import ShardReader
from llmq.models.source import load_config, resolve
from llmq.modules import quantized_modules
from llmq_kernels.compute import MODES, default_mode, refusal

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` as llmq reads it, or None for a full-precision model. Raises
    `LlmqError` for a method that llmq cannot read."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = dict(settings if isinstance(settings, dict) else settings.to_dict())
    method = settings.get("quant_method")
    if method == "auto-round" and "gptq" in str(settings.get("packing_format", "")):
        method = "gptq"  # AutoRound's GPTQ packing under its own name
    if method == "gptq":
        fmt = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if fmt not in ("gptq", "gptq_v2"):
            raise LlmqError(
                f"GPTQ checkpoint format {fmt!r}: expected gptq or gptq_v2; quantize the original model with llmq instead"
            )
        return {
            **settings,
            "quant_method": hf_quantizer.METHOD,
            "format": fmt,
            "checkpoint_format": fmt,
        }
    if method == "bitnet":
        if settings.get("quantization_mode") != "offline":
            raise LlmqError(
                "BitNet checkpoint with online quantization: its weights are not quantized yet; load it with transformers, or take the packed (offline) one"
            )
        return {
            **settings,
            "quant_method": hf_quantizer.METHOD,
            "format": "bitnet",
            "activations": {"kind": "int8-token"},
        }
    if method != hf_quantizer.METHOD:
        raise LlmqError(
            f"quantization method {method!r}: llmq loads llmq, gptq and bitnet folders; quantize the original model with llmq instead"
        )
    return settings


@one_at_a_time
def load(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    compute: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder, a Hub id or "tiny": quantized in `llmq` or `gptq` format (also
    GPTQModel's and AutoRound's), or in full precision.

    dtype: of activations and unquantized weights: "auto" (as stored), "float32", "bfloat16",
    "float16". compute: "exact", or "int8" to let quantized layers round their activations to INT8
    per token and group on a CPU, which is faster (default: what LLMQ_COMPUTE says, else "exact").
    Raises `LlmqError` when anything is missing, left over or damaged."""
    if dtype not in _DTYPES:
        raise LlmqError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    compute = _checked_compute(compute, device)
    model_dir = resolve(model, revision)
    config = load_config(model_dir)
    settings = quantization_settings(config)
    ShardReader(model_dir)  # every shard is there and readable
    if settings is not None:
        config.quantization_config = settings
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=_DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := info.get("missing_keys"):
        raise LlmqError(
            f"{model_dir}: {len(missing)} missing keys, the first being {sorted(missing)[0]}; the checkpoint is incomplete"
        )
    if mismatched := info.get("mismatched_keys"):
        name, found, expected = min(mismatched)
        raise LlmqError(
            f"{model_dir}: tensor {name} has shape {list(found)}, expected {list(expected)}; config.json does not belong to these weights"
        )
    quantized: PreTrainedModel = loaded.to(device).eval()
    for module in quantized_modules(quantized).values():
        module.set_compute(compute)
    take_turns(quantized)
    return quantized


def _checked_compute(mode: str | None, device: str) -> str:
    try:
        mode = mode or default_mode()
    except ValueError as error:
        raise LlmqError(str(error)) from None
    if mode not in MODES:
        raise LlmqError(f"compute {mode!r}: expected one of {', '.join(MODES)}")
    if reason := refusal(mode, torch.device(device)):
        raise LlmqError(
            f"compute {mode}: {reason}; without it (compute exact) the model runs here, too"
        )
    return mode
