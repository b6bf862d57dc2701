"""From a name to a folder: one that is here, the bundled `tiny`, or a Hub id, which is
downloaded."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from llmq.errors import LlmqError

BUNDLED = {"tiny": "assets/tiny"}
# Models that are one file, and who makes a folder of it: a room above this one, so that it is
# named and not imported.
_UNPACKED_BY = {".gguf": "llmq.formats.gguf.unpack"}
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


def is_bundled(folder: Path) -> bool:
    """Whether a folder is that of a model that comes with llmq."""
    return any(folder == _bundled(name) for name in BUNDLED)


def _bundled(name: str) -> Path:
    return Path(str(files("llmq").joinpath(BUNDLED[name])))


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model. `model`: a folder, a `.gguf` file, the name of the bundled
    model, or a Hub id (downloaded to the usual cache, token from the usual places).

    Raises `LlmqError` when it cannot be found, with the reason that the Hub gave.
    """
    name = os.fspath(model)
    if name in BUNDLED and not Path(name).exists():
        return _bundled(name)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise LlmqError(
                f"{name}: no config.json in this folder; expected a Hugging Face model folder "
                "(config.json, *.safetensors, tokenizer files)"
            )
        return Path(name)
    if (unpacked_by := _UNPACKED_BY.get(Path(name).suffix.lower())) and Path(name).is_file():
        folder: Path = import_module(unpacked_by).unpacked(Path(name))
        return folder
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise LlmqError(
            f"{name}: no such folder; give a folder with config.json, a .gguf file, a Hub id such "
            "as Qwen/Qwen3-0.6B, or 'tiny' for the bundled model"
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
