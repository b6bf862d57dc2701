"""From what a checkpoint stores to the model it is: what is stored decides, not what its config
says, and what is not used is named.

`tie_word_embeddings` is true in many configs whose files hold an output head of its own: merged
adapters that trained the head, resized vocabularies. transformers keeps such a head, other engines
drop it; so does whoever believes the config. Here the two tensors are compared, and where they
differ the config that is worked with, and written, says that they are not tied."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.models import compat
from llmq.models.keep import is_extra_layer
from llmq.models.names import check_dtypes, check_shapes, left_out, match_names
from llmq.models.shards import ShardReader
from llmq.models.source import Source, meta_model

ROWS_AT_A_TIME = 4096  # of two stored matrices that are compared: 134 MB at a width of 4096


@dataclass(frozen=True)
class StoredModel:
    """The model that the tensors of a source belong to. config: the source's, or a copy without
    ties where a tied tensor is stored with values of its own. skeleton: on the meta device. names:
    of parameters and persistent buffers -> those they are stored under."""

    source: Source
    config: PretrainedConfig
    skeleton: PreTrainedModel
    names: dict[str, str]

    @classmethod
    def of(cls, source: Source) -> StoredModel:
        """Raises `LlmqError` when tensors are missing."""
        config, skeleton = _model_of(source.config, source.tensors)
        return cls(source, config, skeleton, match_names(skeleton, source.tensors.names))

    @property
    def others(self) -> list[str]:
        """Stored tensors that the model has no place for, sorted."""
        return sorted(set(self.source.tensors.names) - set(self.names.values()))

    def check(self) -> None:
        """Raise `LlmqError` for the first tensor of another shape than the config gives, or that
        holds no real numbers where the model does."""
        shards = self.source.tensors
        check_shapes(self.skeleton, shards, self.names)
        check_dtypes(self.skeleton, shards.dtypes, self.names, str(self.source.folder))

    def remarks(self, strict: bool = False) -> dict[str, str]:
        """What is to be known of the config, where other values than its own are needed to run the
        model, and of the stored tensors: an output head of its own beside a config that
        says tied, parts that are no text model, and tensors without a place. Raises `LlmqError` for
        the last under `strict`."""
        model, shards = self.skeleton, self.source.tensors
        remarks = {
            f"config.{key}": f"{old!r} in config.json; the model is run and written with {new!r}"
            for key, (old, new) in self.source.config_changes.items()
        }
        if self.config is not self.source.config:
            remarks["output head"] = (
                "config.json says that it is tied to the embeddings, but one with other values is "
                "stored: that one is kept, and the output says tie_word_embeddings false"
            )
        others = self.others
        extra = [name for name in others if is_extra_layer(name, model.config)]
        unknown = left_out(model, others)
        if is_text_part(model, self.config):
            if others:
                remarks["source tensors"] = (
                    f"{len(others)} of {len(shards.names)} belong to other parts than the text "
                    f"model {type(model).__name__} and are kept as they are"
                )
            return remarks
        if extra:
            remarks["layers beside the model"] = (
                f"{len(extra)} of {len(shards.names)} tensors are of layers that "
                f"{type(model).__name__} does not load (multi-token prediction) and are copied as "
                f"they are, the first being {extra[0]}"
            )
        if unknown:
            told = (
                f"{len(unknown)} of {len(shards.names)} are not used by {type(model).__name__} as "
                f"config.json describes it"
            )
            if strict:
                raise LlmqError(f"--strict: {shards.model_dir}: {told}, the first {unknown[0]}")
            remarks["source tensors"] = (
                f"{told} and are copied as they are, the first being {unknown[0]}"
            )
        return remarks


def _model_of(
    config: PretrainedConfig, shards: ShardReader
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The meta model that the stored tensors belong to, and its config: the given one, or a copy
    without ties where a tied tensor is stored with values of its own. Raises `LlmqError` when
    tensors are missing."""
    model = meta_model(config)
    matched = match_names(model, shards.names)
    ties = compat.ties(model)
    separate = [
        target
        for target, source in ties.items()
        if target in matched
        and matched[target] != matched[source]
        and not _same_values(shards, matched[target], matched[source])
    ]
    if not separate:
        return config, model
    if lacking := [target for target in ties if target not in matched]:
        raise LlmqError(
            f"{shards.model_dir}: config.json ties the weights, {separate[0]} is stored with "
            f"values of its own and {lacking[0]} is not stored at all; load and save the model "
            "with transformers once, then use the result"
        )
    config = untied(config)
    return config, meta_model(config)


def untied(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config whose head has a weight of its own."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return config


def state_ties(model: PreTrainedModel) -> None:
    """Have the config of a model in memory say that its head is not tied, where it is not: whoever
    ties the weights again, or writes the model, goes by the config."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embeddings)]
    if not all(isinstance(weight, nn.Parameter) for weight in weights):
        return
    if weights[0] is not weights[1]:
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _same_values(shards: ShardReader, first: str, second: str) -> bool:
    """Whether two stored tensors hold the same numbers, a part at a time."""
    if shards.shapes[first] != shards.shapes[second]:
        return False
    paths = shards.names[first], shards.names[second]
    try:
        with ExitStack() as stack:
            slices = shards.slices(stack)
            parts = slices(first), slices(second)
            n_rows = shards.shapes[first][0] if shards.shapes[first] else 0
            return all(
                torch.equal(*(part[start : start + ROWS_AT_A_TIME].float() for part in parts))
                for start in range(0, n_rows, ROWS_AT_A_TIME)
            )
    except (SafetensorError, OSError) as error:
        where = " or ".join(dict.fromkeys(Path(path).name for path in paths))
        raise LlmqError(
            f"{shards.model_dir}: {where} is damaged ({error}); download it again"
        ) from None


def is_text_part(model: PreTrainedModel, config: PretrainedConfig) -> bool:
    """Whether the model is the text model alone of a checkpoint of several: of such, only the text
    model can be built as a causal language model."""
    return type(model.config) is not type(config)
