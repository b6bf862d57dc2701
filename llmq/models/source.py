"""From a name to a model: a Hub id, a folder or the bundled `tiny`; its config, its tokenizer, and
the model on the meta device."""

from __future__ import annotations

import copy
import logging
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
from llmq.messages import escaped
from llmq.models.arch import check_supported, check_type
from llmq.models.building import one_at_a_time
from llmq.models.shards import ShardReader
from llmq.models.sizes import check_buffers, check_sizes
from llmq.storage.boundary import check_folder, reading
from llmq.storage.json_files import read_object

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
MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 512 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
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
                f"{name}: no config.json in this folder; expected a Hugging Face model folder "
                "(config.json, *.safetensors, tokenizer files)"
            )
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise LlmqError(
            f"{name}: no such folder; give a folder with config.json, a Hub id such as "
            "Qwen/Qwen3-0.6B, or 'tiny' for the bundled model"
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
            f"{repo_id}: access is gated; accept its licence on the Hub, then log in with 'hf auth "
            "login' or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise LlmqError(
            f"{repo_id}: no revision {revision!r}; give a branch, tag or commit that the Hub lists "
            "for it"
        ) from None
    except RepositoryNotFoundError:
        raise LlmqError(
            f"{repo_id}: neither a folder here nor a model on the Hub (a private one needs "
            "HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        raise LlmqError(
            f"{repo_id}: not in the local cache and the Hub cannot be reached; check the network "
            "and HF_ENDPOINT, or give a folder"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LlmqError(
            f"{repo_id}: download failed ({str(error).splitlines()[0]}); check the name, the "
            "network and the free space of the cache"
        ) from None


@one_at_a_time
def load_config(model_dir: Path) -> PretrainedConfig:
    """The config of a causal LM. Raises `LlmqError` for what is damaged, not a causal LM or not
    supported. Remote code is never run."""
    path = model_dir / "config.json"
    check_folder(model_dir)
    settings = read_object(path, "a model config", _CONFIG_REMEDY, max_bytes=MAX_CONFIG_BYTES)
    with reading(path, "not a model config that transformers can read", _CONFIG_REMEDY):
        check_type(settings.get("model_type"))  # type: ignore[arg-type]
        check_sizes(settings, model_dir)
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        text = config.get_text_config()
        if not isinstance(text, PretrainedConfig):
            raise TypeError(f"the config of its text model is no object but {text!r}")
        check_supported(config)
        check_buffers(config, path)
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
                f"{model_dir / name}: an adapter that is not merged into the weights beside it; "
                "merge it (peft: merge_and_unload) and save the result, or move it away"
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
    settings = read_object(path, "the settings of a GPTQ folder", _CONFIG_REMEDY)
    bits = settings.get("bits")
    if bits is None:
        raise LlmqError(
            f"{path}: not the settings of a GPTQ folder: has no 'bits', but packed tensors are "
            f"stored and config.json has no settings; {_CONFIG_REMEDY}"
        )
    config.quantization_config = {"quant_method": "gptq", **settings, "bits": bits}


@one_at_a_time
def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `LlmqError` when it has none."""
    check_folder(model_dir)
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
            model_dir, trust_remote_code=False
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


@one_at_a_time
def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, in
    float32."""
    with (
        reading(_origin(config), "no model that transformers can build", _CONFIG_REMEDY),
        init_empty_weights(include_buffers=False),
    ):
        # from_config writes its dtype into the config it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32
        )
    return model.eval()


def _origin(config: PretrainedConfig) -> str:
    """What to call a config in a message."""
    folder = getattr(config, "_name_or_path", "")
    return f"{folder}/config.json" if folder else f"config of type {config.model_type}"
