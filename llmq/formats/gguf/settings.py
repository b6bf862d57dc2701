"""From llama.cpp's keys to transformers' config: the inverse of `metadata.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.formats.gguf.families import Family, rope_factors
from llmq.formats.gguf.fields import Fields

# What llama.cpp takes where a file does not say.
_USUAL_BASE = 10_000.0
_USUAL_WINDOW_BASE = 10_000.0
_USUAL_WINDOW = 4096
_USUAL_PATTERN = {"gemma2": 2, "gemma3": 6}
_LARGEST = {"gemma2": 46, "gemma3": 62}
_USUAL_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# The bounds between short and long waves in every Llama from 3.1 on.
_LOW_AND_HIGH = (1.0, 4.0)
_ORIGINAL = 8192
_CLOSE = 1e-4


def config_values(
    fields: Fields, family: Family, names: set[str], factors: Tensor | None
) -> dict[str, Any]:
    """The values of a config. names: of the model's parameters that the file has. factors: of the
    frequencies, where they are stored. Raises `LlmqError` for what is missing or cannot be said."""
    model = fields.of(family.arch)
    n_heads, width = model.count("attention.head_count"), model.count("embedding_length")
    if not n_heads:
        raise model.wrong("attention.head_count", n_heads, "one head or more")
    head_dim = model.count("attention.key_length", width // n_heads)
    tokens = fields.list_of("tokenizer.ggml.tokens", str)
    values: dict[str, Any] = {
        "vocab_size": model.count("vocab_size", len(tokens)),
        "hidden_size": width,
        "intermediate_size": model.count("feed_forward_length"),
        "num_hidden_layers": model.count("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": model.count("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": model.count("context_length"),
        "rms_norm_eps": model.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in names,
    }
    if model.count("attention.value_length", head_dim) != head_dim:
        raise model.wrong("attention.value_length", None, f"the length of a key, {head_dim}")
    if model.count("rope.dimension_count", head_dim) != head_dim:
        raise model.wrong("rope.dimension_count", None, f"the length of a key, {head_dim}")
    if family.arch == "llama":
        values["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
        values["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in names
    rotations = _rotations(model, head_dim, factors)
    if family.windows == "pattern":
        values |= _gemma(model, family, values, rotations)
    else:
        values["rope_parameters"] = rotations
    for name, key in (
        ("bos_token_id", "bos"),
        ("eos_token_id", "eos"),
        ("pad_token_id", "padding"),
    ):
        values[name] = fields.maybe_count(f"tokenizer.ggml.{key}_token_id")
    return values


def _gemma(
    model: Fields, family: Family, values: dict[str, Any], rotations: dict[str, Any]
) -> dict[str, Any]:
    n_layers, head_dim = values["num_hidden_layers"], values["head_dim"]
    is_largest = n_layers == _LARGEST[family.arch]
    scalar = values["hidden_size"] // values["num_attention_heads"] if is_largest else head_dim
    usual_window = _USUAL_WINDOW if family.arch == "gemma2" else 0
    window = model.count("attention.sliding_window", usual_window)
    found = {
        "query_pre_attn_scalar": scalar,
        "layer_types": _layer_types(model, family, n_layers, window),
        "sliding_window": window or values["max_position_embeddings"],
    }
    for key, usual in _USUAL_CAPS.items():
        value = model.maybe_real(key)
        found[key] = value or (usual if family.arch == "gemma2" else None)
    if family.arch == "gemma2":
        return found | {"rope_parameters": rotations}
    local = {
        "rope_type": "default",
        "rope_theta": model.real("rope.freq_base_swa", _USUAL_WINDOW_BASE),
    }
    rotations = {"full_attention": rotations, "sliding_attention": local}
    return found | {"rope_parameters": rotations}


def _layer_types(model: Fields, family: Family, n_layers: int, window: int) -> list[str]:
    """As the file says, layer by layer or by how many there are to one without a window."""
    stated = model.get("attention.sliding_window_pattern")
    if isinstance(stated, list):
        windows = [bool(each) for each in model.list_of("attention.sliding_window_pattern", int)]
        if len(windows) != n_layers:
            raise model.wrong("attention.sliding_window_pattern", windows, f"{n_layers} layers")
    else:
        period = model.count("attention.sliding_window_pattern", _USUAL_PATTERN[family.arch])
        windows = [not period or index % period < period - 1 for index in range(n_layers)]
    return ["sliding_attention" if each and window else "full_attention" for each in windows]


def _rotations(model: Fields, head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    base = model.real("rope.freq_base", _USUAL_BASE)
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    kind = model.text("rope.scaling.type", "none")
    factor = model.maybe_real("rope.scaling.factor")
    if factors is not None:
        return _llama3(model, base, head_dim, factors)
    if kind == "none" or factor is None or factor in (0, 1):
        return found
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise model.wrong("rope.scaling.type", kind, "none, linear or yarn")
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        if model.get(f"rope.scaling.{name}") is not None:
            raise model.wrong(f"rope.scaling.{name}", model.get(f"rope.scaling.{name}"), "nothing")
    found |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.count("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if (value := model.maybe_real(f"rope.scaling.yarn_{name}")) is not None:
            found[name] = value
    return found


def _llama3(model: Fields, base: float, head_dim: int, factors: Tensor) -> dict[str, Any]:
    """The parameters that the stored factors come from."""
    low, high = _LOW_AND_HIGH
    found = {
        "rope_theta": base,
        "factor": float(factors.max()),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": model.count(
            "rope.scaling.original_context_length", _ORIGINAL
        ),
    }
    expected = rope_factors(found, head_dim) if found["factor"] > 0 else factors
    if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=_CLOSE):
        raise model.wrong("rope_freqs", factors.tolist()[:3], "the factors of Llama 3.1")
    return {"rope_type": "llama3", **found}
