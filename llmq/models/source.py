"""A model as it is stored, opened once: its files, its config, its tokenizer, its tensors, and the
model on the meta device."""

from __future__ import annotations

import copy
import logging
import os
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmq.errors import LlmqError
from llmq.messages import escaped
from llmq.models import compat
from llmq.models.arch import check_supported, check_type, set_config_values
from llmq.models.building import one_at_a_time
from llmq.models.companions import Companions, find_companions
from llmq.models.expert_views import expert_views, may_hold_experts
from llmq.models.experts import unfuse
from llmq.models.hub import resolve
from llmq.models.identity import model_name
from llmq.models.joined_views import joined_views
from llmq.models.low_precision import decoded, kinds, stated_settings
from llmq.models.shards import ShardReader
from llmq.models.sizes import check_buffers, check_sizes
from llmq.models.tensors import ViewedTensors
from llmq.storage.boundary import check_folder, reading
from llmq.storage.json_files import read_object
from llmq.storage.stamps import SourceFiles

__all__ = ["Source", "load_config", "load_tokenizer", "meta_model", "resolve"]

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 512 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
LARGE = 1 << 24  # numbers, above which only weights lie
_CONFIG_REMEDY = "compare it with that of the original model, or download it again"
_TOKENIZER_REMEDY = "copy tokenizer.json and tokenizer_config.json into it"
_PROBE = "A test: 12 b\u00e9\u4e2d\U0001f600\n\tx"


class _Printable(logging.Filter):
    """Shows control characters that a message of transformers has from a file, and drops
    nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage(), keep="\n\t"), None
        return True


for _handler in logging.getLogger("transformers").handlers:
    _handler.addFilter(_Printable())


class Source:
    """A resolved model, opened once per command and handed on: every part is read when it is first
    asked for, and then kept. folder: where it lies. files: its files as they were when it was
    opened, before anything was read.

    What is in it is shared: who wants another config copies it. Every fault is a `LlmqError` that
    names the file."""

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self.files = SourceFiles.of(folder)
        # What reading the config changed in it: key -> the value in the file, the one it has now.
        self.config_changes: dict[str, tuple[Any, Any]] = {}

    @classmethod
    def open(cls, model: str | os.PathLike[str] | Source, revision: str | None = None) -> Source:
        """The model of a name (see `llmq.models.hub.resolve`), or the one that is open already."""
        return model if isinstance(model, Source) else cls(resolve(model, revision))

    @property
    def name(self) -> str:
        """What reports call it."""
        return model_name(self.folder)

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The object in config.json, as it is written."""
        path = self.folder / "config.json"
        return read_object(path, "a model config", _CONFIG_REMEDY, max_bytes=MAX_CONFIG_BYTES)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of a causal LM. Raises `LlmqError` for what is damaged, not a causal LM or not
        supported. Remote code is never run."""
        return _read_config(self)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder. Raises `LlmqError` when it has none."""
        return _read_tokenizer(self.folder, self.config)

    @cached_property
    def shards(self) -> ShardReader:
        """Every stored tensor: its file, its shape, its dtype."""
        return ShardReader(self.folder, self.stated)

    @cached_property
    def decoded(self) -> ShardReader:
        """The same, where those of few bits are bfloat16."""
        return decoded(self.shards, self.stated)

    @cached_property
    def tensors(self) -> ShardReader:
        """The tensors as the model wants them that is quantized: one for each layer, in full
        precision."""
        if not may_hold_experts(self.decoded):
            return self.decoded
        model = meta_model(self.config)
        views = {**joined_views(model, self.decoded), **expert_views(model, self.decoded)}
        return ViewedTensors(self.decoded, views)

    @property
    def precision(self) -> dict[str, int]:
        """What tensors of few bits are stored as, and how many of each; nothing of others."""
        return kinds(self.decoded)

    @property
    def as_stored(self) -> Source:
        """What is run: this."""
        return self

    @property
    def weight_paths(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self.shards.names.values()))

    @property
    def weight_bytes(self) -> int:
        """Size of these files."""
        return sum(path.stat().st_size for path in self.weight_paths)

    @property
    def decoded_bytes(self) -> int:
        """Size of the tensors in full precision."""
        if self.decoded is self.shards:
            return self.weight_bytes
        return sum(map(self.decoded.bytes_of, self.decoded.names))

    @property
    def weight_names(self) -> set[str]:
        """Names of what is read to get at the tensors: these files, and their index."""
        return {self.shards.start, *(path.name for path in self.weight_paths)}

    @cached_property
    def companions(self) -> Companions:
        """What belongs to it beside the weights, and what stays behind."""
        return find_companions(self.folder, self.weight_names)


def load_config(model_dir: Path) -> PretrainedConfig:
    """`Source.config` of a folder that is opened for it alone."""
    return Source(model_dir).config


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever its model is."""
    check_folder(model_dir)
    return _read_tokenizer(model_dir)


@one_at_a_time
def _read_config(source: Source) -> PretrainedConfig:
    path, stated = source.folder / "config.json", source.stated
    with reading(path, "not a model config that transformers can read", _CONFIG_REMEDY):
        check_type(stated.get("model_type"))  # type: ignore[arg-type]
        check_sizes(stated, source.folder)
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        text = config.get_text_config()
        if not isinstance(text, PretrainedConfig):
            raise TypeError(f"the config of its text model is no object but {text!r}")
        check_supported(config)
        compat.find_lost_tensors(config.model_type)
        source.config_changes = set_config_values(config)
        check_buffers(config, path)
        _refuse_adapter(source.folder)
        _find_quantization(config, source)
        if stated_settings(stated) is not None:
            forget_quantization(config)
    return config


def _refuse_adapter(model_dir: Path) -> None:
    """An adapter beside the weights belongs to the model, and transformers applies it where peft is
    installed; llmq reads the weights alone."""
    if not (model_dir / "adapter_config.json").is_file():
        return
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (model_dir / name).is_file():
            raise LlmqError(
                f"{model_dir / name}: an adapter that is not merged into the weights beside it; "
                "merge it (peft: merge_and_unload) and save the result, or move it away"
            )
    raise LlmqError(
        f"{model_dir / 'adapter_config.json'}: describes an adapter whose weights are not there, "
        "and transformers would go on to look for them; move it away"
    )


def _find_quantization(config: PretrainedConfig, source: Source) -> None:
    """Put quantization settings where everybody looks for them: those of a text model's own config,
    and those that AutoGPTQ wrote into a file beside it until 2023."""
    if getattr(config, "quantization_config", None) is not None:
        return
    inner = getattr(config.get_text_config(), "quantization_config", None)
    if inner is not None:
        config.quantization_config = inner
        return
    path = source.folder / "quantize_config.json"
    if not path.is_file():
        return
    if not any(name.endswith(".qweight") for name in source.shards.names):
        return  # of another model, or of the way that this one went
    settings = read_object(path, "the settings of a GPTQ folder", _CONFIG_REMEDY)
    bits = settings.get("bits")
    if bits is None:
        raise LlmqError(
            f"{path}: not the settings of a GPTQ folder: has no 'bits', but packed tensors are "
            f"stored and config.json has no settings; {_CONFIG_REMEDY}"
        )
    config.quantization_config = {"quant_method": "gptq", **settings, "bits": bits}


def forget_quantization(config: PretrainedConfig) -> None:
    """Make a config that of the model in full precision, which `Source.tensors` gives."""
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)


@one_at_a_time
def _read_tokenizer(
    model_dir: Path, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """config: where it has been read already; transformers reads it once more without."""
    for name in TOKENIZER_FILES:
        if (model_dir / name).exists():
            read_object(
                model_dir / name,
                "a tokenizer file",
                _TOKENIZER_REMEDY,
                max_bytes=MAX_TOKENIZER_BYTES,
            )
    with reading(model_dir, "no tokenizer that transformers can read", _TOKENIZER_REMEDY):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_dir, config=config, trust_remote_code=False
        )
        check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise for a tokenizer that loads and then cannot be used: what the commands ask of it is
    asked once here, of a text that has something of everything."""
    ids = tokenizer(_PROBE, verbose=False)["input_ids"]
    tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        value = getattr(tokenizer, name)
        if not (value is None or type(value) is int):
            raise ValueError(f"{name} {value!r}: expected a whole number")


class _LargeOnMeta(TorchFunctionMode):
    """Weights lie on the meta device from the first. accelerate moves them there when they are in
    their module, and until then the experts of a block of 671B parameters would want 30 GB."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty and options.get("device") is None:
            sizes = options.get("size", args)
            sizes = sizes[0] if sizes and not isinstance(sizes[0], int) else sizes
            if prod(sizes) >= LARGE:
                options["device"] = "meta"
        return function(*args, **options)


@one_at_a_time
def meta_model(
    config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, in
    float32. Experts are layers of their own. model_class: of a model that is there already; None:
    the one that the config names."""
    with (
        reading(_origin(config), "no model that transformers can build", _CONFIG_REMEDY),
        init_empty_weights(include_buffers=False),
        _LargeOnMeta(),
    ):
        # from_config writes its dtype into the config it is given.
        own = copy.deepcopy(config)
        build = compat.auto_class(own).from_config
        if model_class is not None:
            build = model_class._from_config
        model: PreTrainedModel = build(own, dtype=torch.float32)
    unfuse(model)
    return model.eval()


def _origin(config: PretrainedConfig) -> str:
    """What to call a config in a message."""
    folder = getattr(config, "_name_or_path", "")
    return f"{folder}/config.json" if folder else f"config of type {config.model_type}"
