"""Positions as configs said them before transformers 5, for readers that ask for those keys only.

transformers 5 has the base of rotary positions in `rope_parameters`. mlx-lm (0.32.2, llama, qwen2,
gemma2 and others) reads `rope_theta` and takes its own default where that is missing: another model
without a word."""

from __future__ import annotations

from typing import Any

# Kinds whose parameters had the same names in `rope_scaling`.
_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope")
_BASE = "rope_theta"
_APART = (_BASE, "partial_rotary_factor")  # what stood beside it


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with `rope_theta`, `partial_rotary_factor` and `rope_scaling` where its
    `rope_parameters` say them, in parts of it, too. What it has of these keys stays. Parameters by
    kind of layer (Gemma 3) had no common names, so nothing is added for them."""
    found = {key: _part(key, value) for key, value in config.items()}
    parameters = found.get("rope_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get(_BASE), int | float):
        return found
    older = {key: parameters[key] for key in _APART if key in parameters}
    if parameters.get("rope_type") in _SCALED:
        older["rope_scaling"] = parameters  # whole: transformers 5 takes it in their place
    return {**older, **found}


def _part(key: str, value: Any) -> Any:
    """The config of a part of a wrapper, too."""
    is_config = key.endswith("_config") and isinstance(value, dict)
    return with_older_keys(value) if is_config else value
