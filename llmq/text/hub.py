"""Text of data sets of the Hub, streamed: only the rows that are asked for are downloaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llmq.errors import LlmqError, LlmqWarning
from llmq.messages import brief
from llmq.text.address import Address, Purpose, choose_split
from llmq.text.folders import quiet, which_config
from llmq.text.illustrated import COLUMNS
from llmq.text.rows import Documents

MAX_DOCUMENTS = 20_000
_FORM = "name:config:split"


@dataclass(frozen=True)
class HubRows:
    """rows: an iterable of dicts that downloads as it goes. revision: the commit, None where
    datasets does not tell it."""

    rows: Iterable[dict[str, Any]]
    split: str
    revision: str | None


def open_rows(
    address: Address, purpose: Purpose = "train", data_file: str | None = None
) -> HubRows:
    """The rows of a data set. data_file: the only one of its files to look at, for sets of
    thousands of them. Raises `LlmqError` that names what there is to choose from, and whatever
    datasets raises (see `explaining`)."""
    from datasets import load_dataset_builder

    with quiet():
        files = None if data_file is None else {"train": data_file}
        builder = load_dataset_builder(
            address.name, address.config, data_files=files, revision=address.revision
        )
        # Of the Hub the training split is read by default, for whatever purpose.
        splits = _splits(builder)
        split = choose_split(
            address, splits, "train" if "train" in splits else purpose, address.name
        )
        split = split or "train"
        rows = builder.as_streaming_dataset(split=split)
        features = getattr(rows, "features", None) or ()
        if any(name in features for name in COLUMNS):
            rows = rows.decode(False)  # pictures as they are stored
    revision = getattr(builder, "hash", None)
    is_commit = isinstance(revision, str) and len(revision) == 40
    return HubRows(rows, split, revision if is_commit else None)


def _splits(builder: Any) -> list[str]:
    """The splits that a builder knows of, before anything is downloaded."""
    files = getattr(builder.config, "data_files", None)
    return [str(name) for name in files or builder.info.splits or ()]


@contextmanager
def explaining(address: Address) -> Iterator[None]:
    """datasets raises whatever its file systems raise; each means that the data cannot be had."""
    try:
        yield
    except LlmqError:
        raise
    except Exception as error:
        raise explained(address, error) from None


def explained(address: Address, error: Exception) -> LlmqError:
    """What went wrong with a data set of the Hub, and what to type."""
    from datasets import get_dataset_config_names

    name = address.name
    if is_offline():
        return LlmqError(
            f"{name}: not a file here, and a Hub data set cannot be read with HF_HUB_OFFLINE=1; "
            "unset it, or give a file or folder"
        )
    if "Config name is missing" in str(error):
        return which_config(address, get_dataset_config_names(name, revision=address.revision))
    reason = f"{type(error).__name__}: {brief(error)}"
    return LlmqError(
        f"{name}: not a file here, and as a Hub data set it failed ({reason}); expected {_FORM}, "
        f"such as Salesforce/wikitext:wikitext-2-raw-v1:train"
    )


def is_offline() -> bool:
    """Whether the Hub must not be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_DATASETS_OFFLINE", "") == "1"


def add_hub(documents: Documents, address: Address, purpose: Purpose) -> dict[str, Any]:
    """Collect the first `MAX_DOCUMENTS` rows of a data set of the Hub, since some have no end that
    could be waited for, and warn when there are more. Returns what was read. Raises `LlmqError`
    also when the download fails on its way."""
    with quiet(), explaining(address):
        found = open_rows(address, purpose)
        rows = iter(found.rows)
        documents.add(islice(rows, MAX_DOCUMENTS), address.name)
        is_longer = next(rows, None) is not None
    if is_longer:
        warnings.warn(
            f"{address.name}: the first {MAX_DOCUMENTS} documents are used; the data set has more",
            LlmqWarning,
            stacklevel=4,
        )
    return {"config": address.config, "split": found.split, "revision": found.revision}
