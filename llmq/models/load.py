"""From a name to a model: a Hub id, a folder or the bundled `tiny`; its config; the model on the meta device; and a reader that brings single tensors from safetensors.

Weights are never loaded as a whole. The reader opens a shard, copies the tensors that are asked for and closes it again, because mapped pages count as resident memory.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmq.errors import LlmqError
from llmq.models.arch import check_supported, check_type

BUNDLED = {"tiny": "assets/tiny"}
INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
_HUB_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*"]


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model. `model`: a folder, the name of the bundled model, or a Hub id (downloaded to the usual cache, token from the usual places).

    Raises `LlmqError` when it cannot be found, with the reason that the Hub gave.
    """
    name = os.fspath(model)
    if name in BUNDLED and not Path(name).exists():
        return Path(str(files("llmq").joinpath(BUNDLED[name])))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise LlmqError(f"{name}: no config.json in this folder; expected a Hugging Face model folder (config.json, *.safetensors, tokenizer files)")
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise LlmqError(f"{name}: no such folder; give a folder with config.json, a Hub id such as Qwen/Qwen3-0.6B, or 'tiny' for the bundled model")
    return _download(name, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except GatedRepoError:
        raise LlmqError(f"{repo_id}: access is gated; accept its licence on the Hub, then log in with 'hf auth login' or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise LlmqError(f"{repo_id}: no revision {revision!r}; give a branch, tag or commit that the Hub lists for it") from None
    except RepositoryNotFoundError:
        raise LlmqError(f"{repo_id}: neither a folder here nor a model on the Hub (a private one needs HF_TOKEN)") from None
    except LocalEntryNotFoundError:
        raise LlmqError(f"{repo_id}: not in the local cache and the Hub cannot be reached; check the network and HF_ENDPOINT, or give a folder") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LlmqError(f"{repo_id}: download failed ({str(error).splitlines()[0]}); check the name, the network and the free space of the cache") from None


def load_config(model_dir: Path) -> PretrainedConfig:
    """The config of a causal LM. Raises `LlmqError` for what is damaged, not a causal LM or not supported. Remote code is never run."""
    try:
        check_type(json.loads((model_dir / "config.json").read_text()).get("model_type"))
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmqError(f"{model_dir / 'config.json'}: not a model config that transformers can read ({str(error).splitlines()[0]})") from None
    check_supported(config)
    return config


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `LlmqError` when it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise LlmqError(f"{model_dir}: no tokenizer that transformers can read ({str(error).splitlines()[0]}); copy tokenizer.json and tokenizer_config.json into it") from None
    return tokenizer


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, in float32."""
    with init_empty_weights(include_buffers=False):
        # from_config writes its dtype into the config it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    return model.eval()


class ShardReader:
    """Tensors of a folder of safetensors by name. `names`: every tensor, with the file that holds it; `shapes`: its shape. Every fault of the files is a `LlmqError` that names the file."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.names: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._scan()

    def _scan(self) -> None:
        single = self.model_dir / "model.safetensors"
        if single.is_file():  # before an index that lies beside it, as transformers does: both must read the same weights
            paths = [single]
        elif (self.model_dir / INDEX).is_file():
            paths = self._indexed_files()
        else:
            paths = sorted(self.model_dir.glob("*.safetensors"))
            paths = paths if len(paths) == 1 else []
        if not paths:
            pickles = " (only pickled weights, which can run code and are not read: convert them to safetensors first)" if list(self.model_dir.glob("*.bin")) else ""
            raise LlmqError(f"{self.model_dir}: no model.safetensors and no {INDEX}{pickles}")
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self.names:
                    raise LlmqError(f"{path}: tensor {name} is also in {self.names[name].name}; the folder mixes two models")
                self.names[name] = path
                self.shapes[name] = entry["shape"]

    def _indexed_files(self) -> list[Path]:
        index = self.model_dir / INDEX
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            file_names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LlmqError(f"{index}: not a safetensors index; download it again") from None
        for file_name in file_names:
            if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
                raise LlmqError(f"{index}: refers to {file_name!r}; expected plain names of .safetensors files in the same folder")
            if not (self.model_dir / file_name).is_file():
                raise LlmqError(f"{index}: refers to {file_name}, which is missing; download the model again")
        return [self.model_dir / file_name for file_name in file_names]

    @staticmethod
    def names_in(path: Path) -> list[str]:
        """The tensors of one file."""
        return list(read_header(path))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the named tensors. Raises `LlmqError` for a damaged file and for NaN or infinite values, naming the tensor."""
        tensors: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.names[name], []).append(name)
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in wanted:
                        tensors[name] = shard.get_tensor(name).clone()
            except (SafetensorError, OSError) as error:
                raise LlmqError(f"{path}: damaged ({error}); download it again") from None
        for name, tensor in tensors.items():
            check_finite(f"{self.names[name]}: tensor {name}", tensor)
        return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `LlmqError` for NaN or infinite values."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LlmqError(f"{name} holds {int((~torch.isfinite(tensor)).sum())} NaN or infinite values of {tensor.numel()}; the weights are damaged: download or convert the model again")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape} of a safetensors file, without its data. Raises `LlmqError` when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as shard:
            stored = shard.keys()
            slices = {name: shard.get_slice(name) for name in stored}
            return {name: {"dtype": part.get_dtype(), "shape": tuple(part.get_shape())} for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise LlmqError(f"{path}: not a readable safetensors file ({error}); download it again") from None


def stored_to_model_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> model name, by transformers' own renaming rules (base prefixes, `embed_out` of GPT-NeoX). Tensors that need more than a new name raise `LlmqError`."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    renamed = {}
    for name in stored:
        renamed[name], converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is not None and renamed[name] in state:
            raise LlmqError(f"tensor {name} is stored in an older layout of {type(model).__name__}; load and save the model with transformers once, then quantize the result")
    return renamed


def match_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Model parameter or persistent buffer -> stored name. Raises `LlmqError` when a parameter is missing that is not tied to another."""
    state = model.state_dict()
    matched = {name: stored_name for stored_name, name in stored_to_model_names(model, stored).items() if name in state}
    missing = [name for name, _ in model.named_parameters() if name not in matched and name not in model.all_tied_weights_keys]
    if missing:
        raise LlmqError(f"the checkpoint lacks {len(missing)} of the tensors that {type(model).__name__} needs, the first being {missing[0]}")
    return matched


def check_shapes(model: PreTrainedModel, shards: ShardReader, matched: Mapping[str, str]) -> None:
    """Raise `LlmqError` for the first stored tensor whose shape is not the one that the config gives. matched: as `match_names` gives it."""
    state = model.state_dict()
    for name, stored in matched.items():
        if shards.shapes[stored] != tuple(state[name].shape):
            raise LlmqError(f"{shards.names[stored]}: tensor {stored} has shape {list(shards.shapes[stored])}, expected {list(state[name].shape)}; config.json does not belong to these weights")


def left_out(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Those of the stored tensors without a place in the model that hold something of their own: not the buffers that models compute themselves, nor what transformers leaves out on purpose."""
    computed = [re.escape(name) + "$" for name, _ in model.named_buffers()]
    redundant = re.compile("|".join([*computed, r"rotary_emb\.inv_freq$", r"attn\.masked_bias$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    return [name for name in unused if not redundant.search(name)]
