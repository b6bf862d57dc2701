"""From a name to a model: a Hub id, a folder or the bundled `tiny`; its config, its tokenizer, and
the model on the meta device."""

from __future__ import annotations

import copy
import json
import os
from importlib.resources import files
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmq.errors import LlmqError
from llmq.models.arch import check_supported, check_type
from llmq.models.shards import ShardReader

BUNDLED = {"tiny": "assets/tiny"}
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "README.md",
]
_HUB_FILES += ["*[Ll][Ii][Cc][Ee][NnSs]*", "*[Nn][Oo][Tt][Ii][Cc][Ee]*", "*COPYING*", "*POLICY*"]
# No folder but additional_chat_templates.
_HUB_IGNORED = ["consolidated*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model. `model`: a folder, the name of the bundled model, or a Hub id
    (downloaded to the usual cache, token from the usual places).

    Raises `LlmqError` when it cannot be found, with the reason that the Hub gave.
    """
    name = os.fspath(model)
    if name in BUNDLED and not Path(name).exists():
        return Path(str(files("llmq").joinpath(BUNDLED[name])))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise LlmqError(
                f"{name}: no config.json in this folder; expected a Hugging Face model folder (config.json, *.safetensors, tokenizer files)"
            )
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise LlmqError(
            f"{name}: no such folder; give a folder with config.json, a Hub id such as Qwen/Qwen3-0.6B, or 'tiny' for the bundled model"
        )
    return _download(name, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        )
    except GatedRepoError:
        raise LlmqError(
            f"{repo_id}: access is gated; accept its licence on the Hub, then log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise LlmqError(
            f"{repo_id}: no revision {revision!r}; give a branch, tag or commit that the Hub lists for it"
        ) from None
    except RepositoryNotFoundError:
        raise LlmqError(
            f"{repo_id}: neither a folder here nor a model on the Hub (a private one needs HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise LlmqError(
            f"{repo_id}: not in the local cache and the Hub cannot be reached; check the network and HF_ENDPOINT, or give a folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LlmqError(
            f"{repo_id}: download failed ({str(error).splitlines()[0]}); check the name, the network and the free space of the cache"
        ) from None


def load_config(model_dir: Path) -> PretrainedConfig:
    """The config of a causal LM. Raises `LlmqError` for what is damaged, not a causal LM or not
    supported. Remote code is never run."""
    try:
        check_type(json.loads((model_dir / "config.json").read_text()).get("model_type"))
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmqError(
            f"{model_dir / 'config.json'}: not a model config that transformers can read ({str(error).splitlines()[0]})"
        ) from None
    check_supported(config)
    _refuse_adapter(model_dir)
    _find_quantization(config, model_dir)
    return config


def _refuse_adapter(model_dir: Path) -> None:
    """An adapter beside the weights belongs to the model, and transformers applies it where peft is
    installed; llmq reads the weights alone."""
    if not (model_dir / "adapter_config.json").is_file():
        return
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (model_dir / name).is_file():
            raise LlmqError(
                f"{model_dir / name}: an adapter that is not merged into the weights beside it; merge it (peft: merge_and_unload) and save the result, or move it away"
            )


def _find_quantization(config: PretrainedConfig, model_dir: Path) -> None:
    """Put quantization settings where everybody looks for them: those of a text model's own config,
    and those that AutoGPTQ wrote into a file beside it until 2023."""
    if getattr(config, "quantization_config", None) is not None:
        return
    inner = getattr(config.get_text_config(), "quantization_config", None)
    if inner is not None:
        config.quantization_config = inner
        return
    path = model_dir / "quantize_config.json"
    if not path.is_file():
        return
    names = ShardReader(model_dir).names
    if not any(name.endswith(".qweight") for name in names):
        return  # of another model, or of the way that this one went
    try:
        settings = json.loads(path.read_text())
        bits = settings["bits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LlmqError(
            f"{path}: not the settings of a GPTQ folder ({error}), but packed tensors are stored and config.json has none; download it again"
        ) from None
    config.quantization_config = {"quant_method": "gptq", **settings, "bits": bits}


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `LlmqError` when it has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise LlmqError(
            f"{model_dir}: no tokenizer that transformers can read ({str(error).splitlines()[0]}); copy tokenizer.json and tokenizer_config.json into it"
        ) from None
    return tokenizer


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, in
    float32."""
    with init_empty_weights(include_buffers=False):
        # from_config writes its dtype into the config it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32
        )
    return model.eval()
