"""What a generation config asks of `generate`, and which of it llmq cannot give.

A folder's `generation_config.json`, or its `config.json` where that is missing, decides as much as
the caller does: whether keys and values are kept at all, in which cache, in how many beams. What
applies in the end is found here by transformers' own order of precedence, so that llmq's cache is
handed over only where transformers would have made its default one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.storage.boundary import reading
from llmq.storage.json_files import read_object

FILE = "generation_config.json"
REMEDY = "compare it with that of the original model"
MOST_SEQUENCES = 4096  # beams or texts at once: a slip of the pen beyond would fill the memory

_BOOLS = (
    "do_sample",
    "use_cache",
    "use_mtp",
    "renormalize_logits",
    "remove_invalid_values",
    "token_healing",
    "is_assistant",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "low_memory",
    "disable_compile",
)
_COUNTS = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "max_cache_len",
    "num_assistant_tokens",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "prefill_chunk_size",
    "top_k",
)
_NUMBERS = (
    "max_time",
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "diversity_penalty",
    "penalty_alpha",
    "guidance_scale",
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
)
_TEXTS = ("cache_implementation", "num_assistant_tokens_schedule", "speculation_type")
_IDS = ("pad_token_id", "bos_token_id", "forced_bos_token_id")
_ID_OR_IDS = ("eos_token_id", "forced_eos_token_id", "decoder_start_token_id")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_AT_LEAST_ONE = (
    "max_length",
    "max_new_tokens",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "max_cache_len",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "prefill_chunk_size",
)

# What changes only which token is chosen, when to stop or what is returned. Everything else that
# transformers knows, today or in a later version, gets transformers' own cache.
_CACHE_NEUTRAL = frozenset(
    (
        *_BOOLS,
        *_COUNTS,
        *_NUMBERS,
        *_IDS,
        *_ID_OR_IDS,
        *_ID_LISTS,
        "early_stopping",
        "stop_strings",
        "bad_words_ids",
        "sequence_bias",
        "exponential_decay_length_penalty",
        "watermarking_config",
        "num_assistant_tokens_schedule",
        "cache_implementation",
        "cache_config",
        "compile_config",
        "transformers_version",
    )
) - {
    "use_mtp",
    "token_healing",
    "is_assistant",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "prefill_chunk_size",
    "penalty_alpha",
}
# Arguments of `generate` that are no settings and bring a cache or a loop of their own.
_OWN_LOOPS = ("cache", "past_key_values", "assistant_model", "custom_generate", "inputs_embeds")
_DYNAMIC = (None, "dynamic", "hybrid")  # transformers takes "hybrid" for its default as well


# --- what applies ---------------------------------------------------------------------------------


def effective(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `model.generate(**options)` goes by, by name, None where nobody says:
    options, then the `generation_config` among them, then the model's own."""
    given = options.get("generation_config")
    found = {}
    for name in vars(GenerationConfig()):
        if name.startswith("_"):
            continue
        value = getattr(given, name, None)
        found[name] = getattr(model.generation_config, name, None) if value is None else value
    return {**found, **{name: value for name, value in options.items() if name in found}}


def takes_in_place_cache(
    model: PreTrainedModel, settings: Mapping[str, Any], options: Mapping[str, Any]
) -> bool:
    """Whether `generate` would make its default cache for these settings, which llmq's replaces."""
    if any(options.get(name) is not None for name in _OWN_LOOPS):
        return False
    if settings["use_cache"] is False or settings["cache_implementation"] not in _DYNAMIC:
        return False
    others = (value for name, value in settings.items() if name not in _CACHE_NEUTRAL)
    return all(value is None or value is False for value in others) and _keeps_keys(model)


def _keeps_keys(model: PreTrainedModel) -> bool:
    """Whether a model takes a `DynamicCache`: some keep states under other names."""
    supports: Callable[[], bool] = getattr(model, "_supports_default_dynamic_cache", lambda: False)
    is_other = model.config.is_encoder_decoder or "mamba" in type(model).__name__.lower()
    return supports() and not is_other


# --- what is refused ------------------------------------------------------------------------------


def check(settings: Mapping[str, Any], device: str, *, remote_code: bool = False) -> None:
    """Raise `LlmqError`, naming the key, for values of a wrong type and for what needs code or
    packages that are not here. device: its type. remote_code: whether the caller brings a decoding
    loop of his own."""
    check_values(settings)
    reason = _cache_refusal(settings, device)
    reason = reason or (None if remote_code else _loop_refusal(settings))
    if reason:
        raise LlmqError(f"generation config: {reason}; take it out of {FILE}, or set it to null")


def _cache_refusal(settings: Mapping[str, Any], device: str) -> str | None:
    kind = settings["cache_implementation"]
    if settings["use_cache"] is False or kind is None:
        return None
    if kind == "quantized":
        return "cache_implementation 'quantized' needs a package that llmq does not bring"
    if kind.startswith("offloaded") and device == "cpu":
        return f"cache_implementation {kind!r} moves keys and values from a GPU, and this is a CPU"
    return None


def _loop_refusal(settings: Mapping[str, Any]) -> str | None:
    """transformers gave these loops away; their code would come from the Hub, and llmq runs
    none."""

    def outside(name: str, what: str) -> str:
        return (
            f"{name} {settings[name]!r} asks for {what}, which is no part of transformers any more"
        )

    n_beams, is_sampled = settings["num_beams"] or 1, settings["do_sample"] is True
    for name in ("constraints", "force_words_ids"):
        if settings.get(name) is not None:
            return outside(name, "constrained beams")
    if n_beams == 1 and (settings.get("penalty_alpha") or 0) > 0 and not is_sampled:
        top_k = settings["top_k"]
        if top_k is None or top_k > 1:
            return outside("penalty_alpha", "contrastive search")
    if n_beams > 1 and (settings.get("num_beam_groups") or 1) > 1:
        return outside("num_beam_groups", "groups of beams")
    if n_beams == 1 and settings.get("dola_layers") is not None:
        return outside("dola_layers", "contrasting layers (DoLa)")
    n_texts = settings["num_return_sequences"] or 1
    if n_texts > 1 and n_beams == 1 and not is_sampled:
        return f"num_return_sequences {n_texts} needs a temperature above 0 or num_beams"
    if n_texts > n_beams > 1:
        return f"num_return_sequences {n_texts} is more than the num_beams {n_beams}"
    return None


# --- what is damaged ------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return is_finite and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_id, value))


def _is_count(value: Any) -> bool:
    return _is_id(value) and value >= 0


def _is_texts(value: Any) -> bool:
    """One string or several, none empty: every text ends in an empty one."""
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts)


_Rule = tuple[Callable[[Any], bool], str]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_BOOLS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(_COUNTS, (_is_count, "a whole number from 0 on")),
    **dict.fromkeys(
        _AT_LEAST_ONE, (lambda value: _is_count(value) and value > 0, "a whole number from 1 on")
    ),
    **dict.fromkeys(
        ("num_beams", "num_return_sequences"),
        (
            lambda value: _is_count(value) and 0 < value <= MOST_SEQUENCES,
            f"a whole number from 1 to {MOST_SEQUENCES}",
        ),
    ),
    **dict.fromkeys(_NUMBERS, (_is_number, "a number")),
    **dict.fromkeys(_TEXTS, (lambda value: isinstance(value, str), "a string")),
    **dict.fromkeys(_IDS, (_is_id, "a token id")),
    **dict.fromkeys(_ID_OR_IDS, (lambda value: _is_id(value) or _is_ids(value), "token ids")),
    **dict.fromkeys(
        _ID_LISTS, (lambda value: value == [] or _is_ids(value), "a list of token ids")
    ),
    "early_stopping": (
        lambda value: isinstance(value, bool) or value == "never",
        "true, false or 'never'",
    ),
    "stop_strings": (_is_texts, "a string or a list of strings, none of them empty"),
    "bad_words_ids": (
        lambda value: isinstance(value, list) and all(map(_is_ids, value)),
        "a list of lists of token ids",
    ),
    "exponential_decay_length_penalty": (
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and _is_count(value[0])
            and _is_number(value[1])
        ),
        "a start and a factor",
    ),
    "sequence_bias": (lambda value: isinstance(value, list | dict), "a list of ids and biases"),
    "cache_config": (lambda value: isinstance(value, dict), "an object"),
}


def check_values(settings: Mapping[str, Any], where: str = "generation config") -> None:
    """Raise `LlmqError`, naming the key, for the first value that is not of its kind. Names that
    transformers does not know mean nothing to it, and none here."""
    for name, (is_right, expected) in _RULES.items():
        value = settings.get(name)
        if value is not None and not is_right(value):
            shown = repr(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise LlmqError(f"{where}: {name} is {shown}; expected {expected}")


def read_settings(model_dir: Path) -> dict[str, Any]:
    """What the folder of a model says of generation, checked before any weight is read. Raises
    `LlmqError` for a file that is damaged, or that transformers refuses."""
    path = model_dir / FILE
    if not path.is_file():
        path = model_dir / "config.json"  # what transformers goes by then
    stored = read_object(path, "a generation config", REMEDY)
    check_values(stored, str(path))
    with reading(path, "not a generation config that transformers can read", REMEDY):
        if path.name == FILE:
            config = GenerationConfig.from_pretrained(model_dir)
        else:
            config = GenerationConfig.from_model_config(stored)
    return vars(config)


def explain(error: Exception, settings: Mapping[str, Any]) -> str:
    """What transformers objects to, with the keys that it can be about: those it names, else all
    that are set."""
    known = vars(GenerationConfig())
    names = [name for name, value in settings.items() if name in known and value is not None]
    names = [name for name in names if not name.startswith("_") and name != "transformers_version"]
    named = [name for name in names if name in str(error)] or names
    shown = ", ".join(sorted(named)[:6]) + (", ..." if len(named) > 6 else "")
    return f"transformers refuses {shown or 'these settings'} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
