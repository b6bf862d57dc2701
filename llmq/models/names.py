"""Between the names that a checkpoint stores its tensors under and those of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.expert_views import fused_names, layer_of_expert, number_of_expert
from llmq.models.experts import LAYERS_OF, unfused_in
from llmq.models.keep import is_extra_layer
from llmq.models.shards import ShardReader

FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the dtypes of real numbers


def stored_to_model_names(
    model: PreTrainedModel, stored: Iterable[str], *, converted: bool = False
) -> dict[str, str]:
    """Stored name -> model name, by transformers' own renaming rules (base prefixes, `embed_out` of
    GPT-NeoX). Tensors that need more than a new name raise `LlmqError`, unless transformers loads
    the model. converted: it does."""
    state, experts = model.state_dict(), unfused_in(model)
    names = {}
    for each in compat.renamed(model, stored, fused_names(experts)):
        names[each.stored] = layer_of_expert(experts, each) or each.name
        if each.is_converted and each.name in state and not converted:
            raise LlmqError(
                f"tensor {each.stored} is stored in another layout than {type(model).__name__} "
                "computes with (transformers converts it while it loads); load the model with "
                "transformers, save it with save_pretrained(FOLDER, save_original_format=False), "
                "and quantize that"
            )
    return names


def original_names(
    model: PreTrainedModel, skeleton: PreTrainedModel, names: Iterable[str]
) -> dict[str, str]:
    """Model name -> the name in the checkpoint that the model was loaded from, or else in those of
    its family. A name that loading would not find its way back from stays as it is. skeleton: the
    model in full precision, on the meta device. names: of its tensors."""
    transforms = compat.without_merges(compat.conversions(model), LAYERS_OF)
    found = compat.undo_renamings(transforms, names)
    back = stored_to_model_names(skeleton, found.values(), converted=True)
    return {name: stored if back[stored] == name else name for name, stored in found.items()}


def match_names(
    model: PreTrainedModel, stored: Iterable[str], *, converted: bool = False
) -> dict[str, str]:
    """Model parameter or persistent buffer -> stored name. converted: see `stored_to_model_names`.
    Raises `LlmqError` when a parameter is missing that is not tied to another."""
    state = model.state_dict()
    stored = list(stored)
    matched = {
        name: stored_name
        for stored_name, name in stored_to_model_names(model, stored, converted=converted).items()
        if name in state
    }
    ties = compat.ties(model)
    for target, source in ties.items():
        # Of two tied tensors either may be the one that is stored, as transformers has it.
        if source not in matched and target in matched:
            matched[source] = matched.pop(target)
    # Of tied parameters named_parameters gives the first alone, which need not be the source.
    needed = dict.fromkeys([*(name for name, _ in model.named_parameters()), *ties.values()])
    missing = [name for name in needed if name not in matched and name not in ties]
    if missing:
        raise LlmqError(
            f"the checkpoint lacks {len(missing)} of the tensors that {type(model).__name__} "
            f"needs, the first being {missing[0]}{_hint(model, missing, stored)}"
        )
    return matched


def _hint(model: PreTrainedModel, missing: list[str], stored: list[str]) -> str:
    """What to do about a missing output head, which may only be tied in truth, and why a tensor is
    missing that is stored."""
    possible = compat.possible_ties(model)
    if missing[0] in stored:
        taken = stored_to_model_names(model, [missing[0]])[missing[0]]
        return (
            f": it is stored, but by the rules of this transformers it is {taken}, which the model "
            "does not have; start from the original checkpoint, or from one that another version "
            "of transformers saved"
        )
    if not all(name in possible for name in missing):
        return ""
    return (
        "; config.json says tie_word_embeddings false: where the original ties them, set it to true"
    )


def check_shapes(model: PreTrainedModel, shards: ShardReader, matched: Mapping[str, str]) -> None:
    """Raise `LlmqError` for the first stored tensor whose shape is not the one that the config
    gives. matched: as `match_names` gives it."""
    state = model.state_dict()
    for name, stored in matched.items():
        if shards.shapes[stored] != tuple(state[name].shape):
            raise LlmqError(
                f"{shards.names[stored]}: tensor {stored} has shape {list(shards.shapes[stored])}, "
                f"expected {list(state[name].shape)}; config.json does not belong to these weights"
            )


def check_dtypes(
    model: PreTrainedModel, dtypes: Mapping[str, str], matched: Mapping[str, str], where: str
) -> None:
    """Raise `LlmqError` for the first stored tensor that holds something else than the real numbers
    that the model has in its place. dtypes: by stored name, as safetensors calls them."""
    state = model.state_dict()
    for name, stored in matched.items():
        dtype = dtypes[stored]
        if state[name].is_floating_point() and dtype not in FLOATS:
            reason = (
                "8-bit floats need the scales that belong to them, which are not stored"
                if dtype.startswith("F")
                else "these are codes or flags, not weights"
            )
            raise LlmqError(
                f"{where}: tensor {stored} is stored as {dtype}, expected {', '.join(FLOATS)}: "
                f"{reason}; start from the full-precision model"
            )


def left_out(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Those of the stored tensors without a place in the model that hold something of their own:
    not the buffers that models compute themselves, nor what transformers leaves out on purpose, nor
    whole layers beside those that make the next token (see `llmq.models.keep`)."""
    redundant = compat.redundant_names(model)
    n_experts = max((each.n_experts for each in unfused_in(model).values()), default=None)
    return [
        name
        for name in unused
        if not redundant.search(name)
        and not is_extra_layer(name, model.config)
        and not _is_of_no_expert(name, n_experts)
    ]


def _is_of_no_expert(name: str, n_experts: int | None) -> bool:
    """Whether a tensor is stored for a number behind the last expert, which hands its inputs on
    (LongCat). n_experts: of the model, None where it has none."""
    number = number_of_expert(name)
    return number is not None and n_experts is not None and number >= n_experts
