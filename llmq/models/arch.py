"""What has to be known of a model family, and how little that is: where its blocks are, which of
their layers are linear, and whether every window needs a BOS token.

The list of blocks is found, not tabulated: it is the one `ModuleList` of `config.num_hidden_layers`
members that hold linear layers, or the one of these inside the text model. A family gets a row here
when something cannot be found that way, and to be listed as tested."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.site import Site, site_of, sites_in
from llmq.recipe import Layer

USUAL_LENGTH = 2048
MOST_STRETCHED = 1e6  # factors of rotary positions beyond are no factors


@dataclass(frozen=True)
class Family:
    """bos_every_window: the model is broken on text that does not start with BOS (Gemma: perplexity
    3.5 with it, 6e9 without). config_values: what keys of the config are set to when it is read,
    and in the output. refused: why it cannot be quantized. is_tested: whether a test of ours runs
    it as a whole."""

    model_type: str
    bos_every_window: bool = False
    config_values: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    is_tested: bool = True


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("gemma", bos_every_window=True),
        Family("gemma2", bos_every_window=True),
        Family("gemma3_text", bos_every_window=True),
        Family("phi3"),
        Family("qwen3_5_text"),
        Family("gpt2"),
        Family("opt"),
        Family("gpt_neox"),
        Family("falcon"),
        Family("gemma3n_text", bos_every_window=True, is_tested=False),
        Family("gemma4_text", bos_every_window=True, is_tested=False),
        Family("gemma4_unified_text", bos_every_window=True, is_tested=False),
        Family("recurrent_gemma", bos_every_window=True, is_tested=False),
        Family("vaultgemma", bos_every_window=True, is_tested=False),
        # Or it divides weights in place when it runs, for the range of float16; packed ones do not.
        Family("rwkv", config_values={"rescale_every": 0}),
    )
}
TESTED = ", ".join(name for name, family in FAMILIES.items() if family.is_tested)
# What a family without a row needs: nothing.
_PLAIN = Family("", is_tested=False)


def family_of(config: PretrainedConfig) -> Family:
    """The row of a model's family. A multimodal model needs what its text model needs."""
    return FAMILIES.get(config.get_text_config().model_type, _PLAIN)


def config_changes(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """What a config says otherwise than its family is run with: key -> its value, the other."""
    text_config = config.get_text_config()
    values = family_of(config).config_values
    found = {key: (getattr(text_config, key, None), value) for key, value in values.items()}
    return {key: (old, new) for key, (old, new) in found.items() if old != new}


def set_config_values(config: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Give a config, in place, the values that its family is run with. Returns what that
    changed."""
    changed = config_changes(config)
    for key, (_, value) in changed.items():
        setattr(config.get_text_config(), key, value)
    return changed


def check_type(model_type: str) -> None:
    """Refuse a `model_type` that transformers has no causal language model for, alone or in a
    wrapper, naming the nearest family. Raises `LlmqError`."""
    if model_type not in compat.causal_models() and model_type not in compat.wrapper_models():
        tested = [name for name, family in FAMILIES.items() if family.is_tested]
        nearest = difflib.get_close_matches(str(model_type), tested, n=1)
        hint = f" (the nearest is {nearest[0]})" if nearest else ""
        raise LlmqError(
            f"model type {model_type!r} is not a causal language model that transformers can "
            f"build. Tested families: {TESTED}{hint}; other dense causal LMs usually "
            "work"
        )


def check_supported(config: PretrainedConfig) -> None:
    """Refuse, from the config alone, what cannot be quantized as a whole, of a type that passed
    `check_type`. Raises `LlmqError`."""
    text_config = config.get_text_config()
    if reason := family_of(config).refused:
        raise LlmqError(f"{text_config.model_type}: {reason}; this architecture is not supported")
    found = config.architectures or []
    generating = {
        *compat.causal_models().values(),
        # A wrapper, whose text model predicts the next token like any other.
        compat.wrapper_models().get(config.model_type),
    }
    if found and not generating.intersection(found):
        raise LlmqError(
            f"{found[0]} is not a causal language model; expected weights of "
            f"{_generating_class(config)}, or of another that predicts the next token"
        )


def _generating_class(config: PretrainedConfig) -> str:
    """The class of a type that predicts the next token."""
    named = compat.causal_models().get(config.model_type)
    return named or compat.wrapper_models()[config.model_type]


def position_limit(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for, or None where there is no limit. With scaled rotary
    positions these are more than `max_position_embeddings` says where that is what the model was
    trained with; they are never fewer."""
    text_config = config.get_text_config()
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    if not limit or not compat.has_rotary_positions(text_config):  # learned ones just end
        return limit
    scaled = [_scaled_limit(limit, *rope) for rope in _rotary_positions(text_config)]
    return max(limit, min(scaled, default=limit))


def usual_length(config: PretrainedConfig) -> int:
    """Tokens of a window where nobody says how many: 2048, or what the model has positions for."""
    return min(USUAL_LENGTH, position_limit(config) or USUAL_LENGTH)


def _rotary_positions(config: PretrainedConfig) -> list[tuple[dict[str, Any], bool]]:
    """What each kind of layer rotates by, and whether it is the same for all layers. Of several
    kinds only those that see the whole text: no token is far away in a sliding window."""
    stored = compat.rotary_parameters(config)
    kinds = {name: rope for name, rope in stored.items() if isinstance(rope, dict)}
    if not kinds:
        return [(stored, True)] if stored else []
    return [(rope, False) for name, rope in kinds.items() if "sliding" not in name]


def _scaled_limit(limit: int, rope: dict[str, Any], is_for_all: bool) -> int:
    """The positions of one kind of layer by transformers' `modeling_rope_utils`. YaRN and LongRoPE
    stretch those of `original_max_position_embeddings`, whether or not the config counts the
    result; linear and dynamic scaling those of a `max_position_embeddings` that stays as it was.
    Where only some layers are scaled (Gemma 3), and for Llama 3, the config has the result."""
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, int | float) or not 1 <= factor < MOST_STRETCHED:
        return limit
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or limit
        return max(limit, int(original * factor)) if isinstance(original, int) else limit
    if kind in ("linear", "dynamic") and is_for_all:
        return int(limit * factor)
    return limit


def check_length(
    config: PretrainedConfig, n_tokens: int, what: str, remedy: str | None = None
) -> None:
    """Raise `LlmqError` for more tokens than a model has positions for: learned ones run out, and
    rotary ones that it never saw give nonsense without a word. remedy: what to do about `what`."""
    limit = position_limit(config)
    if limit and n_tokens > limit:
        raise LlmqError(
            f"{what}: {config.model_type} has positions for {limit} tokens only; "
            f"{remedy or f'give --sequence-length {limit} or less'}"
        )


def needs_bos(config: PretrainedConfig) -> bool:
    """Whether every window has to start with BOS."""
    return family_of(config).bos_every_window


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(N, K)` of a site, or None for any other module."""
    site = site_of(module)
    return None if site is None else site.shape


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a site as `[N, K]` (a view)."""
    return _site(module).weight


def weight_as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `linear_weight`: `[N, K]` as the layer's own `weight` has it (a view)."""
    return _site(module).stored(weight)


def _site(module: nn.Module) -> Site:
    site = site_of(module)
    assert site is not None
    return site


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the list of transformer blocks. Raises `LlmqError` when there is none, or
    more than one."""
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    found = _lists_of(model, depth)
    if not found:  # LongCat has two attentions in a block, and counts them
        found = _lists_of(model, getattr(config, "num_layers", None))
    names = [name for name, _ in found]
    found = [  # not those inside another: of attentions, or of experts
        (name, module)
        for name, module in found
        if not any(name.startswith(f"{other}.") for other in names)
    ]
    if len(found) > 1:  # towers of a multimodal model may be as deep as its text model
        found = [each for each in found if _is_inside(each[1], model.get_decoder())] or found
    if len(found) != 1:
        there = ", ".join(name for name, _ in found) or "none"
        raise LlmqError(
            f"{type(model).__name__}: expected one list of {depth} blocks that hold linear layers, "
            f"found {there}. Tested families: {TESTED}"
        )
    return found[0]


def _lists_of(model: nn.Module, depth: int | None) -> list[tuple[str, nn.ModuleList]]:
    """The lists of so many modules that hold linear layers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len(module) > 0
        and any(sites_in(module[0]))
    ]


def tower_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of a wrapper that lie where text does not come by: in towers of
    images or sounds, and in what leads from there into the text model."""
    if model.config.get_text_config() is model.config:
        return set()
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    of_text = {
        id(parameter) for part in parts if part is not None for parameter in part.parameters()
    }
    return {name for name, each in model.named_parameters() if id(each) not in of_text}


def _is_inside(module: nn.Module, whole: nn.Module | None) -> bool:
    return whole is not None and any(each is module for each in whole.modules())


def quantizable_layers(model: PreTrainedModel) -> list[Layer]:
    """Every linear layer inside the blocks. Embeddings and the output head lie outside and stay in
    full precision."""
    _check_config_values(model.config)
    prefix, blocks = find_blocks(model)
    refuse_fused_experts(blocks)
    refuse_shared_weights(model, prefix)
    return [
        site.as_layer(f"{prefix}.{i}") for i, block in enumerate(blocks) for site in sites_in(block)
    ]


def _check_config_values(config: PretrainedConfig) -> None:
    """Raise for a model that was built without the values that its family has to be run with: what
    it did to its weights meanwhile is not known."""
    if changed := config_changes(config):
        wanted = ", ".join(f"{key}={new!r}" for key, (_, new) in changed.items())
        found = ", ".join(f"{key}={old!r}" for key, (old, _) in changed.items())
        raise LlmqError(
            f"{config.model_type}: expected a model built with {wanted}, found {found}; give these "
            "to from_pretrained, or quantize its folder"
        )


def refuse_fused_experts(blocks: nn.ModuleList) -> None:
    """Raise for experts fused into one three-dimensional tensor, whatever the config calls them.
    Other such tensors (convolutions, the block-diagonal gates of RecurrentGemma) are no linear
    layers and stay as they are."""
    for name, parameter in blocks[0].named_parameters():
        if parameter.dim() == 3 and any(_is_expert(part) for part in _owners(blocks[0], name)):
            raise LlmqError(
                f"{name} has shape {list(parameter.shape)}: experts in one tensor whose layout "
                "llmq does not know, so they would stay in full precision; this architecture is "
                "not supported"
            )


def _owners(block: nn.Module, name: str) -> Iterator[str]:
    """Names and classes of the modules that a parameter lies in, from the block down."""
    module = block
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        yield part
        yield type(module).__name__


def _is_expert(name: str) -> bool:
    return "expert" in name.lower()


def refuse_shared_weights(model: PreTrainedModel, prefix: str) -> None:
    """Raise for blocks that share weights: each would be quantized for its own inputs, and one
    result would replace the other."""
    for name, source in compat.ties(model).items():
        if name.startswith(prefix + "."):
            raise LlmqError(
                f"{type(model).__name__}: {name} is the same tensor as {source}, and blocks that "
                "share weights cannot be quantized block by block; this architecture is not "
                "supported"
            )
