"""Load a quantized folder, whoever wrote it, or a full-precision one, and check that nothing in it
was made up."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from llmq.arguments import check_type
from llmq.errors import LlmqError, LlmqWarning
from llmq.formats.hf_quantizer import knowing
from llmq.formats.placement import DeviceMap, device_of
from llmq.formats.registry import all_formats
from llmq.formats.settings import format_of, quantization_settings
from llmq.inference.module import quantized_modules
from llmq.inference.rotary import take_turns
from llmq.inference.settings import read_settings
from llmq.models.building import one_at_a_time
from llmq.models.compat import auto_class, only_errors
from llmq.models.decoded_loading import load_decoded
from llmq.models.names import check_dtypes, left_out, stored_to_model_names
from llmq.models.source import Source
from llmq.models.stored import state_ties
from llmq.storage.boundary import reading
from llmq.storage.manifest import check_folder, check_sizes
from llmq_kernels.core import restricted
from llmq_kernels.core.compute import MODES, default_mode, refusal

_DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@one_at_a_time
def load(
    model: str | os.PathLike[str] | Source,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    compute: str | None = None,
    verify: bool = False,
    strict: bool = False,
) -> PreTrainedModel:
    """A causal LM from a folder, a Hub id, a .gguf file, "tiny" or a `Source` that is open:
    quantized in one of `llmq.formats.registry.NAMES` (also by other tools), or in full precision.

    dtype: of activations and unquantized weights: "auto" (as stored), "float32", "bfloat16",
    "float16", or torch's dtype of that name. device: "cpu" (default) or "cuda". device_map: the
    same in transformers' words, "auto" for a GPU with room, else the CPU; a model that would lie on
    several devices is refused.

    compute: "exact", or "int8" to let quantized layers round their activations to INT8
    per token and group on a CPU, which is faster (default: what LLMQ_COMPUTE says, else "exact").
    verify: check every file against the hashes of the manifest that llmq wrote; sizes always are.
    strict: refuse stored tensors that the model has no place for, which are named in a
    `LlmqWarning` otherwise. Raises `LlmqError` when anything is missing or damaged."""
    loaded_dtype = _checked_dtype(dtype)
    check_type(
        "model", model, (str, os.PathLike, Source), "a folder, a Hub id, a .gguf file, or 'tiny'"
    )
    restricted.adapt()
    source = Source.open(model, revision).as_stored
    place = device_of(device, device_map, source.weight_bytes if device_map == "auto" else 0)
    compute = _checked_compute(compute, place)
    (check_folder if verify else check_sizes)(source.folder)
    settings = quantization_settings(source.config)
    loaded, info = _by_transformers(source, settings, loaded_dtype)
    _check_complete(info, source, is_quantized=settings is not None)
    if settings is None:
        _check_dtypes(loaded, source)
    _tell_left_out(loaded, source, info.get("unexpected_keys") or (), strict)
    if settings is not None:
        for remark in format_of(settings).remarks(settings, source.shards.dtypes):
            warnings.warn(f"{source.folder}: {remark}", LlmqWarning, stacklevel=2)
    state_ties(loaded)
    quantized: PreTrainedModel = loaded.to(place).eval()
    for module in quantized_modules(quantized).values():
        module.set_compute(compute)
    take_turns(quantized)
    return quantized


def _by_transformers(
    source: Source, settings: Any, dtype: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on the CPU, and what transformers found while loading it. settings: of its
    quantization, None for full precision. Every shard is there and readable."""
    config, shards = copy.deepcopy(source.config), source.shards
    read_settings(source.folder)
    for part in (config, config.get_text_config()):
        part.transformers_weights = shards.start  # so that transformers opens the same file
    if settings is not None:
        config.quantization_config = copy.deepcopy(settings)
    remedy = "compare its config.json with the original's"
    with (
        reading(source.folder, "transformers cannot load it", remedy),
        knowing(shards),
        only_errors(),
    ):
        if settings is None and source.precision:
            loaded, info = load_decoded(source, config, dtype)
        else:
            loaded, info = auto_class(config).from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    for part in (loaded.config, loaded.config.get_text_config()):
        vars(part).pop("transformers_weights", None)
    return loaded, info


def _check_dtypes(model: PreTrainedModel, source: Source) -> None:
    """Raise `LlmqError` for a tensor in full precision of a dtype that the model cannot take."""
    tensors = source.decoded
    names = stored_to_model_names(model, tensors.names, converted=True)
    state = model.state_dict()
    matched = {name: stored for stored, name in names.items() if name in state}
    check_dtypes(model, tensors.dtypes, matched, str(source.folder))


def _check_complete(info: dict[str, Any], source: Source, *, is_quantized: bool) -> None:
    """Raise `LlmqError` where transformers made something up. info: what it found while loading."""
    if missing := info.get("missing_keys"):
        markers = {fmt.marker for fmt in all_formats()}
        suffixes = {name.rpartition(".")[2] for name in source.shards.names}
        reason = "the checkpoint is incomplete"
        if not is_quantized and not markers.isdisjoint(suffixes):
            reason = (
                "the tensors are packed, but neither config.json nor quantize_config.json says how"
            )
        raise LlmqError(
            f"{source.folder}: {len(missing)} missing keys, the first being {sorted(missing)[0]}; "
            f"{reason}"
        )
    if mismatched := info.get("mismatched_keys"):
        name, found, expected = min(mismatched)
        raise LlmqError(
            f"{source.folder}: tensor {name} has shape {list(found)}, expected {list(expected)}; "
            "config.json does not belong to these weights"
        )


def _tell_left_out(
    model: PreTrainedModel, source: Source, unexpected: Iterable[str], strict: bool
) -> None:
    """Name the stored tensors that decide nothing: those that the model has no place for and, of
    packed layers, those that its format or its settings do not use."""
    quantizer = getattr(model, "hf_quantizer", None)
    unused = sorted({*left_out(model, unexpected), *getattr(quantizer, "left_out", ())})
    if not unused:
        return
    text = (
        f"{source.folder}: {len(unused)} of {len(source.shards.names)} tensors are not used by "
        f"{type(model).__name__} as config.json describes it and are left out, the first being "
        f"{unused[0]}"
    )
    if strict:
        raise LlmqError(f"--strict: {text}")
    warnings.warn(text, LlmqWarning, stacklevel=3)


def _checked_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        names = ", ".join(_DTYPES)
        raise LlmqError(f"dtype {dtype!r}: expected one of {names}, or torch's of these names")
    return _DTYPES[dtype]


def _checked_compute(mode: str | None, device: torch.device) -> str:
    try:
        mode = mode or default_mode()
    except ValueError as error:
        raise LlmqError(str(error)) from None
    if mode not in MODES:
        raise LlmqError(f"compute {mode!r}: expected one of {', '.join(MODES)}")
    if reason := refusal(mode, device):
        raise LlmqError(
            f"compute {mode}: {reason}; without it (compute exact) the model runs here, too"
        )
    return mode
