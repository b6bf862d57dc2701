"""The `quantization_config` of a folder, as llmq reads it: who wrote it in which layout, with every
value that decides a weight checked.

A value that is not understood is never replaced by a usual one: a folder read by other rules than
it was written by gives numbers that look like weights."""

from __future__ import annotations

import re
from typing import Any

from llmq import patterns
from llmq.errors import LlmqError
from llmq.formats import FORMATS
from llmq.formats.setting_types import as_settings

METHOD = "llmq"
_GPTQ_BITS = (2, 3, 4, 8)
_GPTQ_FORMATS = ("gptq", "gptq_v2")
# AutoRound's names for GPTQ's layout with zero points stored minus one. Its others ("auto_round",
# "auto_round:gptqmodel") look the same and store them as they are.
_AUTO_ROUND_GPTQ = ("auto_round:auto_gptq", "auto_gptq")
_LINEAR_CLASSES = ("bitlinear", "autobitlinear")
_FLAGS = ("sym", "desc_act", "lm_head")


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` as llmq reads it, or None for a full-precision model. Raises
    `LlmqError` for a method, a layout or a value that llmq cannot read."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = as_settings(settings)
    method = settings.get("quant_method")
    if method == "auto-round":
        return _auto_round(settings)
    if method == "gptq":
        return _gptq(settings)
    if method == "bitnet":
        return _bitnet(settings)
    if method != METHOD:
        raise LlmqError(
            f"quantization method {method!r}: llmq loads llmq, gptq and bitnet folders; quantize "
            "the original model with llmq instead"
        )
    check_format(settings.get("format", METHOD))
    return settings


def check_format(name: object) -> str:
    """A format that llmq reads, or `LlmqError`."""
    if not isinstance(name, str) or name not in FORMATS:
        raise LlmqError(
            f"quantization_config: format {name!r}: expected one of {', '.join(FORMATS)}; install "
            "the llmq that wrote it, or quantize the original model"
        )
    return name


def _gptq(settings: dict[str, Any]) -> dict[str, Any]:
    given = {
        key: settings[key]
        for key in ("checkpoint_format", "format")
        if settings.get(key) is not None
    }
    fmt = next(iter(given.values()), "gptq")
    if fmt not in _GPTQ_FORMATS or any(value != fmt for value in given.values()):
        told = " and ".join(f"{key} {value!r}" for key, value in given.items())
        raise LlmqError(
            f"GPTQ checkpoint format: {told}: expected gptq or gptq_v2; quantize the original "
            "model with llmq instead"
        )
    if settings.get("is_marlin_format"):
        raise LlmqError(
            "GPTQ folder repacked for Marlin (is_marlin_format): expected the layout of gptq or "
            "gptq_v2; quantize the original model with llmq instead"
        )
    if (pack_dtype := settings.get("pack_dtype", "int32")) != "int32":
        raise LlmqError(
            f"quantization_config: pack_dtype {pack_dtype!r}: expected 'int32'; quantize the "
            "original model with llmq instead"
        )
    _check_numbers("quantization_config", settings)
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise _wrong("quantization_config: dynamic", dynamic, "an object of patterns")
    for pattern, overrides in dynamic.items():
        if not isinstance(overrides, dict):
            raise _wrong(f"quantization_config: dynamic[{pattern!r}]", overrides, "an object")
        patterns.check(
            pattern.removeprefix("+:").removeprefix("-:"),
            f"quantization_config: dynamic[{pattern!r}]",
        )
        _check_numbers(f"quantization_config: dynamic[{pattern!r}]", overrides)
    return {**settings, "quant_method": METHOD, "format": fmt, "checkpoint_format": fmt}


def _auto_round(settings: dict[str, Any]) -> dict[str, Any]:
    """AutoRound's own name for GPTQ's layout. Its `extra_config` holds what single layers have
    instead: by their names, or by regular expressions that are searched for in them."""
    packing = settings.get("packing_format")
    if packing not in _AUTO_ROUND_GPTQ:
        raise LlmqError(
            f"AutoRound folder with packing_format {packing!r}: llmq reads {_AUTO_ROUND_GPTQ[0]} "
            "(export with --format auto_gptq); quantize the original model with llmq instead"
        )
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise _wrong("quantization_config: extra_config", extra, "an object of layers")
    _check_integers("quantization_config", settings)
    names, searched = {}, {}
    for name, overrides in extra.items():
        if not isinstance(overrides, dict):
            raise _wrong(f"quantization_config: extra_config[{name!r}]", overrides, "an object")
        _check_integers(f"quantization_config: extra_config[{name!r}]", overrides)
        known = {key: overrides[key] for key in ("bits", "group_size", "sym") if key in overrides}
        if isinstance(bits := known.get("bits"), int) and bits >= 16:
            continue  # kept: the stored tensors say so as well
        if re.fullmatch(r"[\w.]+", name):
            names[f"+:{re.escape(name)}$"] = known
        searched[f"+:.*(?:{name})"] = known
        patterns.check(name, f"quantization_config: extra_config[{name!r}]")
    return _gptq(
        {
            **settings,
            "checkpoint_format": None,
            "format": None,
            "dynamic": {**(settings.get("dynamic") or {}), **names, **searched},
        }
    )


def _check_integers(where: str, settings: dict[str, Any]) -> None:
    """That weights are integers and activations are not quantized."""
    data_type = settings.get("data_type", "int")
    if data_type not in ("int", None):
        raise LlmqError(
            f"{where}: data_type {data_type!r}: llmq reads 'int' of AutoRound; quantize the "
            "original model with llmq instead"
        )
    act_bits = settings.get("act_bits")
    if act_bits is not None and not (_is_whole(act_bits) and act_bits >= 16):
        raise LlmqError(
            f"{where}: act_bits {act_bits!r}: llmq does not read AutoRound's quantized "
            "activations; quantize the original model with llmq instead"
        )


def _bitnet(settings: dict[str, Any]) -> dict[str, Any]:
    mode = settings.get("quantization_mode", "offline")
    if mode == "online":
        raise LlmqError(
            "BitNet checkpoint with online quantization: its weights are not quantized yet; load "
            "it with transformers, or take the packed (offline) one"
        )
    if mode != "offline":
        raise _wrong("quantization_config: quantization_mode", mode, "'offline' or 'online'")
    linear_class = settings.get("linear_class", "bitlinear")
    if linear_class not in _LINEAR_CLASSES:
        raise _wrong(
            "quantization_config: linear_class",
            linear_class,
            "'bitlinear' (the scale divides) or 'autobitlinear' (it multiplies)",
        )
    if settings.get("use_rms_norm"):
        raise LlmqError(
            "BitNet checkpoint with a norm inside every layer (use_rms_norm): llmq has no such "
            "layer; load it with transformers"
        )
    return {
        **settings,
        "quant_method": METHOD,
        "format": "bitnet",
        "linear_class": linear_class,
        "activations": {"kind": "int8-token"},
    }


def _check_numbers(where: str, settings: dict[str, Any]) -> None:
    """The values of GPTQ settings that decide how words are read."""
    bits, group_size = settings.get("bits", 4), settings.get("group_size", -1)
    if not _is_whole(bits) or bits not in _GPTQ_BITS:
        raise _wrong(f"{where}: bits", bits, f"one of {', '.join(map(str, _GPTQ_BITS))}")
    if not _is_whole(group_size) or not (group_size == -1 or group_size > 1):
        raise _wrong(f"{where}: group_size", group_size, "-1 or a whole number above 1")
    for flag in _FLAGS:
        if not isinstance(settings.get(flag, False), bool | None):
            raise _wrong(f"{where}: {flag}", settings[flag], "true or false")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(what: str, value: object, expected: str) -> LlmqError:
    return LlmqError(
        f"{what} is {str(value)[:80]!r}, expected {expected}; the config is damaged: download it "
        "again"
    )
