"""Types of what a `quantization_config` says, checked before anything acts on it."""

from __future__ import annotations

from typing import Any

from llmq.errors import LlmqError
from llmq.fields import check_value

REMEDY = "compare it with the quantization_config of the original checkpoint"
MAX_PATTERNS = 100_000
_FIELDS: dict[str, Any] = {
    "quant_method": str,
    "format": str | None,
    "checkpoint_format": str | None,
    "packing_format": str | None,
    "version": str | int,
    "bits": int,
    "group_size": int,
    "sym": bool | None,
    "desc_act": bool | None,
    "lm_head": bool | None,
    "linear_class": str,
    "quantization_mode": str,
}
_OBJECTS = ("spec", "exceptions", "dynamic", "activations", "extra_config")
_LISTS = ("modules_to_not_convert", "ignore")


def as_settings(stored: object) -> dict[str, Any]:
    """A `quantization_config` as an object with values of the types that they must have; a config
    class of transformers is taken as its JSON. Raises `LlmqError`."""
    to_dict = getattr(stored, "to_dict", None)
    settings = to_dict() if callable(to_dict) else stored
    if not isinstance(settings, dict):
        raise LlmqError(
            f"quantization_config: expected an object, got {type(settings).__name__}; {REMEDY}"
        )
    for name, hint in _FIELDS.items():
        if name in settings:
            check_value(settings[name], hint, f"quantization_config: {name}")
    for name in _OBJECTS:
        _check_container(settings, name, dict, "an object")
    for name in _LISTS:
        _check_container(settings, name, list, "a list of names")
        for entry in settings.get(name) or ():
            if not isinstance(entry, str):
                raise LlmqError(
                    f"quantization_config: {name} holds {entry!r}, expected names of modules; "
                    f"{REMEDY}"
                )
    for name in ("exceptions", "dynamic"):
        entries = settings.get(name) or {}
        if len(entries) > MAX_PATTERNS:
            raise LlmqError(
                f"quantization_config: {name} has {len(entries)} entries, expected at most "
                f"{MAX_PATTERNS}; {REMEDY}"
            )
        for key, value in entries.items():
            if not isinstance(value, dict):
                raise LlmqError(
                    f"quantization_config: {name}: {key}: expected an object, got {value!r}; "
                    f"{REMEDY}"
                )
            for part in ("bits", "group_size"):
                if part in value:
                    check_value(value[part], int, f"quantization_config: {name}: {key}: {part}")
    return dict(settings)


def _check_container(settings: dict[str, Any], name: str, kind: type, expected: str) -> None:
    value = settings.get(name)
    if not (value is None or isinstance(value, kind)):
        raise LlmqError(
            f"quantization_config: {name} {value!r}: expected {expected} or null; {REMEDY}"
        )


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def wrong(what: str, value: object, expected: str) -> LlmqError:
    """The error for a value that no tool writes there."""
    return LlmqError(
        f"{what} is {str(value)[:80]!r}, expected {expected}; the config is damaged: download it "
        "again"
    )
