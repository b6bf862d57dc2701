"""What configs said before transformers 5 under other keys, for readers that ask for those only.

transformers 5 has the base of rotary positions in `rope_parameters`. mlx-lm (0.32.2, llama, qwen2,
gemma2 and others) reads `rope_theta` and takes its own default where that is missing: another model
without a word. Of experts it saves some numbers under one key for all families (Qwen3-MoE's
`num_experts` as `num_local_experts`), where mlx-lm asks for the family's own."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

# Kinds whose parameters had the same names in `rope_scaling`.
_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope")
_BASE = "rope_theta"
_APART = (_BASE, "partial_rotary_factor")  # what stood beside it
_OF_EXPERTS = ("expert", "moe")


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with `rope_theta`, `partial_rotary_factor` and `rope_scaling` where its
    `rope_parameters` say them, and with every name that its class knows for what is said of
    experts, in parts of it, too. What it has of these keys stays. Parameters by kind of layer
    (Gemma 3) had no common names, so nothing is added for them."""
    found = {key: _part(key, value) for key, value in config.items()}
    return {**_positions(found), **_experts(found), **found}


def _part(key: str, value: Any) -> Any:
    """The config of a part of a wrapper, too."""
    is_config = key.endswith("_config") and isinstance(value, dict)
    return with_older_keys(value) if is_config else value


def _positions(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get(_BASE), int | float):
        return {}
    older = {key: parameters[key] for key in _APART if key in parameters}
    if parameters.get("rope_type") in _SCALED:
        older["rope_scaling"] = parameters  # whole: transformers 5 takes it in their place
    return older


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """By the other names of the keys that a config has of experts. transformers reads both names as
    one attribute."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return {}
    names: dict[str, str] = CONFIG_MAPPING[kind].attribute_map
    return {
        other: config[name]
        for other, name in names.items()
        if name in config and any(word in f"{other} {name}" for word in _OF_EXPERTS)
    }
