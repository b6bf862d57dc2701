"""What a GGUF file says of a model beside its tensors: from transformers' config to llama.cpp's
keys, and why there is no way. `settings.py` goes the other way."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llmq.errors import LlmqError
from llmq.formats.gguf.families import Family
from llmq.formats.gguf.writer import Value
from llmq.models.compat import rotary_parameters

# Layers of the one size of a family whose attention llama.cpp scales by hidden size / heads.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
_YARN_OPTIONAL = {
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def head_dim_of(config: PretrainedConfig) -> int:
    """Columns of a query of one head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def kv_heads_of(config: PretrainedConfig) -> int:
    """Heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def model_fields(config: PretrainedConfig, family: Family) -> dict[str, Value]:
    """Fields by key, for the config of a text model. Raises `LlmqError` where llama.cpp would
    compute something else."""
    _check(config, family)
    head_dim = head_dim_of(config)
    fields: dict[str, Value] = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": kv_heads_of(config),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": int(config.vocab_size),
        "rope.dimension_count": head_dim,
    }
    fields |= _rotations(config, family)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, key, None):
            fields[key] = float(value)
    windows = window_layers(config)
    if family.windows == "pattern" and any(windows):
        fields["attention.sliding_window"] = int(config.sliding_window)
        fields["attention.sliding_window_pattern"] = windows
    return {f"{family.arch}.{key}": value for key, value in fields.items()}


def window_layers(config: PretrainedConfig) -> list[bool]:
    """Of each layer, whether it looks back no further than its window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [bool(getattr(config, "sliding_window", None))] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def _check(config: PretrainedConfig, family: Family) -> None:
    """Raise `LlmqError` for what llama.cpp has no key for."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != family.activation:
        raise _impossible(family, f"the activation {family.activation}, not {activation!r}")
    if family.arch == "qwen2" and head_dim_of(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        raise _impossible(family, "heads that are as wide together as the model")
    is_short = (getattr(config, "sliding_window", None) or 0) < config.max_position_embeddings
    if family.windows == "none" and is_short and any(window_layers(config)):
        raise _impossible(family, "attention without a sliding window")
    if family.windows == "pattern":
        _check_gemma(config, family)


def _check_gemma(config: PretrainedConfig, family: Family) -> None:
    is_largest = config.num_hidden_layers == _LARGEST[family.arch]
    expected = config.hidden_size / config.num_attention_heads if is_largest else 0
    expected = int(expected) or head_dim_of(config)
    if config.query_pre_attn_scalar != expected:
        raise _impossible(
            family,
            f"query_pre_attn_scalar {expected} for this size, not {config.query_pre_attn_scalar}",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise _impossible(family, "causal attention")
    has_cap = bool(getattr(config, "attn_logit_softcapping", None))
    if has_cap != (family.arch == "gemma2"):
        which = "with" if family.arch == "gemma2" else "without"
        raise _impossible(family, f"attention {which} attn_logit_softcapping")


def _rotations(config: PretrainedConfig, family: Family) -> dict[str, Value]:
    """The keys of rotary positions. The factors of Llama 3.1 are a tensor beside them."""
    parameters = rotary_parameters(config)
    inner = parameters.get("full_attention")
    whole: dict[str, Any] = inner if isinstance(inner, dict) else parameters
    if whole.get("partial_rotary_factor", 1) != 1:
        raise _impossible(family, "rotations of whole heads")
    fields: dict[str, Value] = {"rope.freq_base": float(whole["rope_theta"])}
    kind = whole.get("rope_type", "default")
    if kind == "linear":
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = float(whole["factor"])
    elif kind == "yarn":
        fields |= _yarn(whole, family)
    elif kind == "llama3" and family.arch == "llama":
        original = int(whole["original_max_position_embeddings"])
        fields["rope.scaling.original_context_length"] = original
    elif kind != "default":
        raise _impossible(family, f"rotary positions of type linear or yarn, not {kind!r}")
    local = parameters.get("sliding_attention")
    if isinstance(local, dict):
        if local.get("rope_type", "default") != "default":
            raise _impossible(family, "unscaled positions in sliding windows")
        fields["rope.freq_base_swa"] = float(local["rope_theta"])
    return fields


def _yarn(whole: dict[str, Any], family: Family) -> dict[str, Value]:
    others = {key for key, value in whole.items() if value is not None}
    if unknown := others - _YARN - set(_YARN_OPTIONAL) - {"partial_rotary_factor"}:
        raise _impossible(family, f"yarn without {min(unknown)}")
    fields: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(whole["factor"]),
        "rope.scaling.original_context_length": int(whole["original_max_position_embeddings"]),
    }
    for key, name in _YARN_OPTIONAL.items():
        if whole.get(key) is not None:
            fields[name] = float(whole[key])
    return fields


def llama3_parameters(config: PretrainedConfig) -> dict[str, float] | None:
    """The rotary parameters that are stored as factors of frequencies, or None."""
    parameters = rotary_parameters(config)
    return dict(parameters) if parameters.get("rope_type") == "llama3" else None


def _impossible(family: Family, what: str) -> LlmqError:
    return LlmqError(
        f"GGUF: llama.cpp computes {family.arch} models with {what}; export to another format"
    )
