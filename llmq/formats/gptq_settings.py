"""What config.json says of a folder in GPTQ's layout, by the tools that write one: GPTQModel and
AutoGPTQ under `gptq`, AutoRound under a name of its own."""

from __future__ import annotations

import re
from typing import Any

from llmq import patterns
from llmq.errors import LlmqError
from llmq.formats.base import OWN_METHOD, Settings
from llmq.formats.setting_types import is_whole, wrong

BITS = (2, 3, 4, 8)
VERSION_1, VERSION_2 = "gptq", "gptq_v2"
AUTO_ROUND = "auto-round"
# AutoRound's names for GPTQ's layout: with zero points stored minus one, and as they are.
_AUTO_ROUND_GPTQ = {
    "auto_round:auto_gptq": VERSION_1,
    "auto_gptq": VERSION_1,
    "auto_round": VERSION_2,
    "auto_round:gptqmodel": VERSION_2,
}
AUTO_ROUND_AWQ = "auto_round:auto_awq"
_FLAGS = ("sym", "desc_act", "lm_head")
KEPT_BITS = 16
_WHERE = "quantization_config"


def stated_version(settings: Settings) -> str:
    """The version of the layout that a GPTQ config names, whatever it is. Raises `LlmqError` where
    its two keys disagree."""
    given = _stated(settings)
    version = next(iter(given.values()), VERSION_1)
    if any(value != version for value in given.values()):
        raise _unknown_version(settings)
    return str(version)


def read_gptq(settings: Settings) -> Settings:
    """The settings of a folder of `quant_method` "gptq", checked. Raises `LlmqError`."""
    version = stated_version(settings)
    if version not in (VERSION_1, VERSION_2):
        raise _unknown_version(settings)
    if settings.get("is_marlin_format"):
        raise LlmqError(
            "GPTQ folder repacked for Marlin (is_marlin_format): expected the layout of gptq or "
            "gptq_v2; quantize the original model with llmq instead"
        )
    if (pack_dtype := settings.get("pack_dtype", "int32")) != "int32":
        raise LlmqError(
            f"{_WHERE}: pack_dtype {pack_dtype!r}: expected 'int32'; quantize the original model "
            "with llmq instead"
        )
    _check_numbers(_WHERE, settings)
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise wrong(f"{_WHERE}: dynamic", dynamic, "an object of patterns")
    for pattern, overrides in dynamic.items():
        where = f"{_WHERE}: dynamic[{pattern!r}]"
        if not isinstance(overrides, dict):
            raise wrong(where, overrides, "an object")
        patterns.check(expression_of(pattern), where)
        _check_numbers(where, overrides)
    return {
        **settings,
        "quant_method": OWN_METHOD,
        "format": version,
        "checkpoint_format": version,
    }


def auto_round_version(settings: Settings) -> str | None:
    """The version of GPTQ's layout that an AutoRound config names, None where it names none."""
    packing = settings.get("packing_format")
    return _AUTO_ROUND_GPTQ.get(packing) if isinstance(packing, str) else None


def check_auto_round(settings: Settings) -> dict[str, dict[str, Any]]:
    """What single layers have instead in an AutoRound folder (`extra_config`). Raises `LlmqError`
    where weights are no integers or activations are quantized."""
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise wrong(f"{_WHERE}: extra_config", extra, "an object of layers")
    _check_integers(_WHERE, settings)
    for name, overrides in extra.items():
        where = f"{_WHERE}: extra_config[{name!r}]"
        if not isinstance(overrides, dict):
            raise wrong(where, overrides, "an object")
        _check_integers(where, overrides)
    return extra


def read_auto_round(settings: Settings) -> Settings:
    """AutoRound's own names for GPTQ's layout. Its `extra_config` holds what single layers have
    instead: by their names, or by regular expressions that are searched for in them."""
    version = auto_round_version(settings)
    if version is None:
        raise LlmqError(
            f"AutoRound folder with packing_format {settings.get('packing_format')!r}: llmq reads "
            f"{', '.join(_AUTO_ROUND_GPTQ)} and {AUTO_ROUND_AWQ} (export with --format auto_round, "
            "auto_gptq or auto_awq); quantize the original model with llmq instead"
        )
    extra = check_auto_round(settings)
    names: dict[str, Any] = {}
    searched: dict[str, Any] = {}
    for name, overrides in extra.items():
        known = {key: overrides[key] for key in ("bits", "group_size", "sym") if key in overrides}
        if isinstance(bits := known.get("bits"), int) and bits >= KEPT_BITS:
            continue  # kept: the stored tensors say so as well
        if re.fullmatch(r"[\w.]+", name):
            names[f"+:{re.escape(name)}$"] = known
        searched[f"+:.*(?:{name})"] = known
        patterns.check(name, f"{_WHERE}: extra_config[{name!r}]")
    dynamic = {**(settings.get("dynamic") or {}), **names, **searched}
    return read_gptq({**settings, "checkpoint_format": version, "format": None, "dynamic": dynamic})


def settings_of(name: str, config: Settings) -> Settings:
    """bits, group_size and sym of a layer, the `dynamic` overrides included (regular expressions;
    the first that matches wins)."""
    settings = dict(config)
    for pattern, overrides in (config.get("dynamic") or {}).items():
        if patterns.matches(expression_of(pattern), name, f"{_WHERE}: dynamic"):
            settings.update(overrides)
            break
    return settings


def expression_of(pattern: str) -> str:
    """The regular expression of a key of `dynamic`: "+:" and "-:" before it say what it does."""
    return pattern.removeprefix("+:").removeprefix("-:")


def _stated(settings: Settings) -> dict[str, Any]:
    """What the two keys that name the version say."""
    keys = ("checkpoint_format", "format")
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def _unknown_version(settings: Settings) -> LlmqError:
    told = " and ".join(f"{key} {value!r}" for key, value in _stated(settings).items())
    return LlmqError(
        f"GPTQ checkpoint format: {told}: expected gptq or gptq_v2; quantize the original model "
        "with llmq instead"
    )


def _check_integers(where: str, settings: Settings) -> None:
    """That weights are integers and activations are not quantized."""
    data_type = settings.get("data_type", "int")
    if data_type not in ("int", None):
        raise LlmqError(
            f"{where}: data_type {data_type!r}: llmq reads 'int' of AutoRound; quantize the "
            "original model with llmq instead"
        )
    act_bits = settings.get("act_bits")
    if act_bits is not None and not (is_whole(act_bits) and act_bits >= KEPT_BITS):
        raise LlmqError(
            f"{where}: act_bits {act_bits!r}: llmq does not read AutoRound's quantized "
            "activations; quantize the original model with llmq instead"
        )


def _check_numbers(where: str, settings: Settings) -> None:
    """The values of GPTQ settings that decide how words are read."""
    bits, group_size = settings.get("bits", 4), settings.get("group_size", -1)
    if not is_whole(bits) or bits not in BITS:
        raise wrong(f"{where}: bits", bits, f"one of {', '.join(map(str, BITS))}")
    if not is_whole(group_size) or not (group_size == -1 or group_size > 1):
        raise wrong(f"{where}: group_size", group_size, "-1 or a whole number above 1")
    for flag in _FLAGS:
        if not isinstance(settings.get(flag, False), bool | None):
            raise wrong(f"{where}: {flag}", settings[flag], "true or false")
