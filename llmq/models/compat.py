"""All that llmq takes from transformers beyond its documented interface, in one place: classes and
functions by name, and attributes of its models and configs.

A version of transformers may move or change any of it; tests/models/test_compat.py says of each
what is relied on. Nothing is imported before it is asked for: transformers imports llmq's
quantizer while it is itself half imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Name -> the modules that have had it, the newest first.
HOMES: dict[str, tuple[str, ...]] = {
    "AttentionMaskInterface": ("transformers.masking_utils",),
    "AUTO_QUANTIZATION_CONFIG_MAPPING": ("transformers.quantizers.auto",),
    "BaseModelOutputWithPast": ("transformers.modeling_outputs",),
    "AUTO_QUANTIZER_MAPPING": ("transformers.quantizers.auto",),
    "Conv1D": ("transformers.pytorch_utils",),
    "DynamicLayer": ("transformers.cache_utils",),
    "HfQuantizer": ("transformers.quantizers",),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("transformers.models.auto.modeling_auto",),
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": ("transformers.models.auto.modeling_auto",),
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": ("transformers.models.auto.modeling_auto",),
    "PrefixChange": ("transformers.core_model_loading",),
    "QuantizationConfigMixin": ("transformers.utils.quantization_config",),
    "WeightConverter": ("transformers.core_model_loading",),
    "WeightRenaming": ("transformers.core_model_loading",),
    "get_available_reporting_integrations": ("transformers.integrations",),
    "get_checkpoint_conversion_mapping": ("transformers.conversion_mapping",),
    "get_last_checkpoint": ("transformers.trainer_utils",),
    "get_model_conversion_mapping": ("transformers.conversion_mapping",),
    "register_checkpoint_conversion_mapping": ("transformers.conversion_mapping",),
    "register_quantization_config": ("transformers.quantizers",),
    "register_quantizer": ("transformers.quantizers",),
    "rename_source_key": ("transformers.core_model_loading",),
    "sdpa_attention_forward": ("transformers.integrations.sdpa_attention",),
    "should_convert_module": ("transformers.quantizers.quantizers_utils",),
    "sdpa_mask": ("transformers.masking_utils",),
}
# What transformers itself needs to load a folder of a `quant_method`.
PACKAGES = {
    "auto-round": "auto_round",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
}
# Tensors that transformers saves under the name that they have in the model, and then takes for
# others while it loads, since a rule for the original checkpoint's fits by accident. By model type.
LOST = {"deepseek_v4": ("model.norm.weight",)}
SDPA = "sdpa"  # what transformers calls torch's attention


def __getattr__(name: str) -> Any:
    for home in HOMES.get(name, ()):
        try:
            return getattr(import_module(home), name)
        except (ImportError, AttributeError):
            continue
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    raise ImportError(
        f"transformers {transformers.__version__} has no {name} in {' or '.join(HOMES[name])}; "
        "llmq does not know this version yet: install one that README.md names"
    )


def adopt_methods(config_class: type, methods: Iterable[str]) -> list[str]:
    """Have transformers read the `quantization_config` of folders of these methods with a class of
    ours, whose quantizer loads them then, wherever the package that it would ask for itself is not
    installed. Returns those that were taken. Where the package is there, nothing changes."""
    mapping = __getattr__("AUTO_QUANTIZATION_CONFIG_MAPPING")
    missing = [
        method
        for method in dict.fromkeys(methods)
        if method in PACKAGES and find_spec(PACKAGES[method]) is None
    ]
    mapping.update(dict.fromkeys(missing, config_class))
    return missing


def causal_models() -> Mapping[str, str]:
    """`model_type` -> class, of every causal language model that transformers can build."""
    names: Mapping[str, str] = __getattr__("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    return names


def wrapper_models() -> Mapping[str, str]:
    """`model_type` -> class, of the models of text and images, sounds or videos."""
    names: dict[str, str] = {}
    names |= __getattr__("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    names |= __getattr__("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    return names


def auto_class(config: Any) -> Any:
    """The auto class that builds and loads the model that a config names in `architectures`: a
    wrapper as it is, though its text model may be built alone, else a causal language model."""
    import transformers

    wrapper = wrapper_models().get(config.model_type)
    named = config.architectures or []
    if wrapper is None or (config.model_type in causal_models() and wrapper not in named):
        return transformers.AutoModelForCausalLM
    of_images = __getattr__("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
    if config.model_type in of_images:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForMultimodalLM


def quantization_methods() -> list[str]:
    """The values of `quant_method` that transformers knows."""
    return list(__getattr__("AUTO_QUANTIZER_MAPPING"))


@dataclass(frozen=True)
class Renamed:
    """A stored tensor and the one of the model that it is, or that transformers makes of it (and of
    others) while it loads. part: which of the tensors of a conversion it is, None without one.
    is_joined: the conversion writes them one below the other, and does nothing else."""

    stored: str
    name: str
    part: int | None
    is_joined: bool = False

    @property
    def is_converted(self) -> bool:
        """Whether it is not the tensor itself."""
        return self.part is not None


def renamed(model: Any, stored: Iterable[str], also: Iterable[str] = ()) -> Iterator[Renamed]:
    """What each stored tensor is in the model. also: names that the model's class has beside those
    of the model."""
    get_mapping, rename = (
        __getattr__("get_model_conversion_mapping"),
        __getattr__("rename_source_key"),
    )
    renaming_class, converter_class = __getattr__("WeightRenaming"), __getattr__("WeightConverter")
    transforms = get_mapping(model)
    renamings = [each for each in transforms if isinstance(each, renaming_class)]
    converters = [each for each in transforms if isinstance(each, converter_class)]
    parts = {
        pattern: (part, _joins_rows(each))
        for each in converters
        for part, pattern in enumerate(each.source_patterns)
    }
    state = {**dict.fromkeys(also, True), **model.state_dict()}
    for name in stored:
        new_name, pattern = rename(name, renamings, converters, model.base_model_prefix, state)
        yield Renamed(name, new_name, *((None,) if pattern is None else parts[pattern]))


def _joins_rows(converter: Any) -> bool:
    operations = converter.operations
    is_join = len(operations) == 1 and type(operations[0]).__name__ == "Concatenate"
    return is_join and operations[0].dim == 0 and "*" not in "".join(converter.source_patterns)


def without_merges(transforms: Sequence[Any], layers: Mapping[str, Sequence[str]]) -> list[Any]:
    """What transformers does to the names of stored tensors, without making one tensor of those of
    several experts: each gets the name of a layer of its expert instead. layers: the layers that
    one parameter of all experts holds, by its name."""
    renaming_class, converter_class = __getattr__("WeightRenaming"), __getattr__("WeightConverter")
    found: list[Any] = []
    for each in transforms:
        target = each._original_target_patterns[0].rpartition(".")[2]
        sources = each._original_source_patterns
        is_merge = isinstance(each, converter_class) and all(".*." in name for name in sources)
        if not (is_merge and target in layers):
            found.append(each)
            continue
        for source, layer in zip(sources, layers[target], strict=True):
            leaf = source.removesuffix(".weight").rpartition(".")[2]
            if leaf != layer:
                pattern = rf"(experts\.\d+)\.{leaf}\."
                found.append(renaming_class(pattern, rf"\1.{layer}."))
    return found


def find_lost_tensors(model_type: str) -> list[str]:
    """Give transformers one more rule for each tensor in `LOST` that it would not find when it
    loads a model of this type. Returns their names."""
    if model_type not in LOST:
        return []
    get_rules, renaming_class = (
        __getattr__("get_checkpoint_conversion_mapping"),
        __getattr__("WeightRenaming"),
    )
    # Rules that are tried out remember it, so these are not the ones that will be used.
    tried: list[Any] = get_rules(model_type) or []
    renamings = [each for each in tried if isinstance(each, renaming_class)]
    rules, found = get_rules(model_type), []
    for name in LOST[model_type]:
        taken = name
        for each in renamings:
            taken, _ = each.rename_source_key(taken)
        if taken != name:
            rules.append(renaming_class(f"^{re.escape(taken)}", name))
            found.append(name)
    if found:
        __getattr__("register_checkpoint_conversion_mapping")(model_type, rules, overwrite=True)
    return found


def conversions(model: Any) -> list[Any]:
    """What transformers did to the names of stored tensors when it loaded a model or, of one that
    was made otherwise, does to those of the checkpoints of its family, as `save_pretrained` goes by
    it."""
    known: list[Any] | None = getattr(model, "_weight_conversions", None)
    if known is not None:
        return known
    prefix_class = __getattr__("PrefixChange")
    found = __getattr__("get_model_conversion_mapping")(model, add_legacy=False)
    return [each for each in found if not isinstance(each, prefix_class)]


def set_conversions(model: Any, transforms: Sequence[Any]) -> None:
    """Have `save_pretrained` undo these."""
    model._weight_conversions = list(transforms)


def undo_renamings(transforms: Sequence[Any], names: Iterable[str]) -> dict[str, str]:
    """By names of a model: those that the checkpoint has, as far as it has the same tensors under
    others."""
    renaming_class = __getattr__("WeightRenaming")
    renamings = [each for each in transforms if isinstance(each, renaming_class)]
    backwards = [each.reverse_transform() for each in reversed(renamings)]
    found = {}
    for name in names:
        stored = name
        for each in backwards:
            stored, _ = each.rename_source_key(stored)
        found[name] = stored
    return found


def ties(model: Any) -> dict[str, str]:
    """Parameters that are the same tensor as another: name -> the other's. Of a model as it is
    configured."""
    return dict(model.all_tied_weights_keys)


def forget_ties(model: Any, names: Iterable[str]) -> None:
    """Have transformers tie these parameters of a model no more, in whatever it does with it from
    now on: they are in storage form, where the tie is llmq's affair."""
    gone = set(names)
    for owner, attribute in ((model, "all_tied_weights_keys"), (model, "_tied_weights_keys")):
        declared = getattr(owner, attribute, None)
        if isinstance(declared, dict):
            kept = {
                name: other for name, other in declared.items() if gone.isdisjoint((name, other))
            }
            setattr(owner, attribute, kept)


def possible_ties(model: Any) -> dict[str, str]:
    """Parameters that the model's class ties where its config says so."""
    declared = getattr(model, "_tied_weights_keys", None)
    return dict(declared) if isinstance(declared, dict) else {}


def redundant_names(model: Any) -> re.Pattern[str]:
    """What is stored and means nothing: buffers that models compute themselves, and what
    transformers leaves out on purpose."""
    computed = [re.escape(name) + "$" for name, _ in model.named_buffers()]
    old = [r"rotary_emb\.inv_freq$", r"attn\.masked_bias$"]
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return re.compile("|".join([*computed, *old, *ignored]))


@cache
def cache_name() -> str:
    """What models, `generate` and outputs call the cache of keys and values: `cache` since
    transformers 5.24, `past_key_values` before."""
    output = __getattr__("BaseModelOutputWithPast")
    names = {each.name for each in fields(output)}
    return "cache" if "cache" in names else "past_key_values"


def attention_name(config: Any) -> str | None:
    """Which of transformers' attention functions a config asks for."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def set_attention_name(config: Any, name: str) -> None:
    """Have the layers that hold this config use another attention function from the next call on,
    without the checks that the public setter makes of functions it knows."""
    config._attn_implementation = name


def layer_configs(config: Any) -> list[Any]:
    """The config of each layer: sizes may differ between them (Gemma 4), and the config of all
    then raises where it is asked for such a one."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def has_rotary_positions(config: Any) -> bool:
    """Whether positions are rotations, so that a text may go on after the last."""
    return hasattr(type(config), "rope_parameters")


def rotary_parameters(config: Any) -> dict[str, Any]:
    """What a config says of its rotations, for all layers or by kind of layer."""
    stored = getattr(config, "rope_parameters", None)
    return stored if isinstance(stored, dict) else {}


def rotary_types(module: Any) -> list[Any]:
    """The kinds of rotation that a module computes, none for other modules."""
    found = getattr(module, "rope_type", None)
    kinds = found.values() if isinstance(found, dict) else [found]
    return [kind for kind in kinds if kind is not None]


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep transformers from remarks and bars of its own; llmq makes its own."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    _show_bars(False)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        _show_bars(has_bars)


def is_kept_in_float32(model: Any, name: str) -> bool:
    """Whether transformers loads a parameter in float32 whatever dtype is asked for."""
    patterns = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


@contextmanager
def without_videos() -> Iterator[None]:
    """Have processors load that read videos, too, where torchvision is missing: of these models
    transformers needs it for nothing else."""
    if find_spec("torchvision") is not None:
        yield
        return
    home: Any = import_module("transformers.models.auto.video_processing_auto")
    classes = import_module("transformers.processing_utils").MODALITY_TO_BASE_CLASS_MAPPING
    loader, expected = home.AutoVideoProcessor, classes["video_processor"]
    home.AutoVideoProcessor, classes["video_processor"] = _NoVideos, "ImageProcessingMixin"
    try:
        yield
    finally:
        home.AutoVideoProcessor, classes["video_processor"] = loader, expected


class _NoVideos:
    """In the place of transformers' auto class: gives a processor that reads nothing."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        return import_module("transformers.image_processing_base").ImageProcessingMixin()


def _show_bars(is_wanted: bool) -> None:
    """transformers' own bars only: its functions for this switch those of the Hub's downloads, too,
    and warn where an environment variable has decided about them."""
    from transformers.utils import logging

    logging._tqdm_active = is_wanted
