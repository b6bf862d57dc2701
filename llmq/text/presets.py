"""Texts by name: what other toolkits calibrate on, without anybody having to know where it lies.

ultrachat   HuggingFaceH4/ultrachat_200k, chats through the model's template: what llm-compressor's
            examples calibrate instruct models on
c4          allenai/c4, one file of its English part: the text of the GPTQ paper (Frantar et al.,
            2022) and of GPTQModel's examples
wikitext    Salesforce/wikitext, wikitext-2-raw-v1: what perplexities are published on. Calibrating
            on its training part flatters them
code        theblackcat102/evol-codealpaca-v1, instructions and programs in many languages:
            llm-compressor's `evolcodealpaca`

Of each the first rows of four million characters are read: a million tokens, four times what the
default windows hold. They are downloaded once and kept, with the commit that they are of, so that
the same text is read from then on and the network is asked no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.messages import brief
from llmq.storage import files, seals
from llmq.text.address import Address, Purpose
from llmq.text.folders import quiet
from llmq.text.hub import is_offline, open_rows
from llmq.text.rows import Documents, layout_of
from llmq_kernels.core.cache import cache_dir

MAX_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Preset:
    """A data set of the Hub. split, eval_split: of its training and its test part, None where it
    has no test part. data_file, eval_file: the only file that is looked at, for sets of thousands
    of them."""

    dataset: str
    split: str = "train"
    eval_split: str | None = None
    config: str | None = None
    data_file: str | None = None
    eval_file: str | None = None


PRESETS = {
    "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft"),
    "c4": Preset(
        "allenai/c4",
        eval_split="train",  # datasets calls the only file so
        data_file="en/c4-train.00001-of-01024.json.gz",
        eval_file="en/c4-validation.00000-of-00008.json.gz",
    ),
    "wikitext": Preset("Salesforce/wikitext", eval_split="test", config="wikitext-2-raw-v1"),
    "code": Preset("theblackcat102/evol-codealpaca-v1"),
}


def add_preset(documents: Documents, name: str, purpose: Purpose) -> dict[str, Any]:
    """Collect the documents of a preset, from the cache if they are there. Returns what was read:
    data set, split and commit. Raises `LlmqError` where the Hub is needed and cannot be had."""
    path = cached_path(name, purpose)
    try:
        kept = seals.read_sealed(path)
    except files.DamagedError:
        kept = _download(name, purpose)
        files.make_folder(path.parent)
        seals.write_sealed(path, kept)
    documents.add(kept["rows"], name)
    return {key: kept[key] for key in ("dataset", "config", "split", "revision")}


def cached_path(name: str, purpose: Purpose) -> Path:
    """Where the rows of a preset are kept."""
    return cache_dir() / "text" / f"{name}-{'eval' if purpose == 'eval' else 'train'}.json"


def _download(name: str, purpose: Purpose) -> dict[str, Any]:
    """The first rows of a preset, with the columns that hold text."""
    preset = PRESETS[name]
    split, file = preset.split, preset.data_file
    if purpose == "eval":
        if preset.eval_split is None:
            raise LlmqError(
                f"{name}: {preset.dataset} has no part that is held back for evaluation; give "
                "another --data"
            )
        split, file = preset.eval_split, preset.eval_file
    if is_offline():
        raise LlmqError(
            f"{name}: {preset.dataset} was not downloaded yet, and HF_HUB_OFFLINE=1 is set; unset "
            "it once, or give a file, or 'self' (text of the model's own), or 'bundled'"
        )
    address = Address(preset.dataset, config=preset.config, split=split)
    try:
        found = open_rows(address, purpose, file)
        with quiet():
            rows = _first_rows(found.rows)
    except Exception as error:  # whatever the file systems of datasets raise
        raise LlmqError(
            f"{name}: {preset.dataset} cannot be downloaded ({brief(error)}); check the network "
            "and HF_ENDPOINT, or give a file, or 'self' (text of the model's own), or 'bundled'"
        ) from None
    return {
        "dataset": preset.dataset,
        "config": preset.config,
        "split": split,
        "revision": found.revision,
        "rows": rows,
    }


def _first_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    n_characters = 0
    layout = None
    for row in rows:
        layout = layout or layout_of(row)
        row = {name: row[name] for name in (layout.columns if layout else row)}
        kept.append(row)
        n_characters += len(str(row))
        if n_characters >= MAX_CHARACTERS:
            break
    return kept
