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
from llmq.models.building import one_at_a_time

BUNDLED = {"tiny": "assets/tiny"}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
_HUB_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*"]


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


@one_at_a_time
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
    return config


@one_at_a_time
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


@one_at_a_time
def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, in
    float32."""
    with init_empty_weights(include_buffers=False):
        # from_config writes its dtype into the config it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32
        )
    return model.eval()
