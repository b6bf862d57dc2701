"""Calibration windows that begin with a row and its pictures and go on with text.

The model's own processor says what pictures and their places are; nothing here knows a family. What
it makes of the pixels of all windows may be larger than the model, so it is made anew, batch by
batch, whenever the windows run through the model, from pictures that are checked to be the same."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.messages import brief
from llmq.storage.boundary import reading
from llmq.text.documents import TokenSet, check_vocabulary
from llmq.text.illustrated import IMAGE, IllustratedRow
from llmq.text.rows import LEFT_OUT

# What a processor says of every token, 0 of text.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids")
_LEFT_OUT = ("input_ids", "attention_mask")  # windows are whole
_PLACES = re.compile(r"(image|video|audio|vision|[be]o[ia]).*_token_(id|index)$")
_PROBE = "4711PROBE1147"  # a text that no template writes by itself


def place_ids(config: PretrainedConfig, processor: Any) -> Tensor:
    """Tokens that stand for pictures, sounds and videos, or begin or end them. Text has none."""
    found = {value for name, value in config.to_dict().items() if _PLACES.match(name)}
    for owner in (processor, getattr(processor, "tokenizer", None)):
        for kind in ("image", "video", "audio"):
            found.add(getattr(owner, f"{kind}_token_id", None))
    return torch.tensor(sorted(each for each in found if type(each) is int), dtype=torch.int64)


class RefusedError(LlmqError):
    """The chat template of a model does not take a row."""


@dataclass(frozen=True)
class RowReader:
    """Rows with pictures as a processor reads them. model_class: whose arguments it makes. begin: a
    token that every window begins with, as text; empty for none."""

    processor: Any
    model_class: type[PreTrainedModel]
    begin: str = ""

    def read(self, rows: Sequence[IllustratedRow]) -> dict[str, Tensor]:
        """The model's arguments for a batch of rows. Raises `LlmqError` that names the row for what
        cannot be opened or read."""
        images = [[picture.open() for picture in row.pictures] for row in rows]
        texts = [self.text_of(row) for row in rows]
        where, name = rows[0].where, type(self.processor).__name__
        with reading(where, f"{name} cannot read it", "leave this row out"):
            found = self.processor(
                text=texts,
                images=images,
                return_tensors="pt",
                add_special_tokens=False,
                padding=len(rows) > 1,
            )
        taken = inspect.signature(self.model_class.forward).parameters
        return {name: value for name, value in found.items() if name in taken}

    def text_of(self, row: IllustratedRow) -> str:
        """A row as the processor takes it, with a mark for each picture."""
        text = self._templated(row) if row.is_chat else None
        if text is None:
            place = self._place()
            parts = [part.get("text", place) for turn in row.turns for part in turn["content"]]
            text = "\n".join(parts)
        return text if text.startswith(self.begin) else self.begin + text

    def _templated(self, row: IllustratedRow) -> str | None:
        """By the chat template, None where it has no places for pictures."""
        if not getattr(self.processor, "chat_template", None):
            return None
        try:
            text: str = self.processor.apply_chat_template(row.turns, tokenize=False)
        except Exception as error:  # whatever a template and its filters do
            raise RefusedError(
                f"{row.where}: the chat template cannot write it ({brief(error)}); leave it out"
            ) from None
        return text if text.count(self._mark) == len(row.pictures) else None

    def _place(self) -> str:
        """What stands for a picture within text, by the chat template where there is one."""
        if not getattr(self.processor, "chat_template", None):
            return self._mark
        probe = {"type": "text", "text": _PROBE}
        try:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": [probe, IMAGE, probe]}], tokenize=False
            )
        except Exception:  # of a template, which then has nothing to say
            return self._mark
        found = re.search(f"{_PROBE}(.*?){_PROBE}", text, re.DOTALL)
        place = found[1].strip() if found else ""
        return place if place.count(self._mark) == 1 else self._mark

    @property
    def _mark(self) -> str:
        mark = getattr(self.processor, "image_token", None)
        if not isinstance(mark, str):
            raise LlmqError(
                f"{type(self.processor).__name__}: has no image_token, so where pictures stand in "
                "a text is not known; calibrate on the text alone: FILE#COLUMN"
            )
        return mark


@dataclass(frozen=True)
class PictureInputs:
    """What windows hold beside their tokens. rows: by window. per_token: int64 `[n, T]` by name.
    pictures: digests of a row's, by what it is called. sha256: of all that the processor makes."""

    reader: RowReader
    rows: tuple[IllustratedRow, ...]
    per_token: dict[str, Tensor]
    pictures: dict[str, list[str]]
    sha256: str

    def of(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """The model's arguments for some windows, tokens left out. Raises `LlmqError` for pictures
        that are others by now, and for shapes that make no batch."""
        rows = [self.rows[index] for index in windows]
        for row in rows:
            if _digests(row) != self.pictures[row.where]:
                raise LlmqError(
                    f"{row.where}: its pictures are not what they were when the run began; start "
                    "again"
                )
        found = self.reader.read(rows)
        others = {
            name: value
            for name, value in found.items()
            if name not in (*_LEFT_OUT, *self.per_token)
        }
        return others | {name: value[list(windows)] for name, value in self.per_token.items()}


@dataclass(frozen=True)
class _Head:
    """A row that a window can begin with: its tokens `[t]`, what is said of each, and the hash of
    everything else."""

    row: IllustratedRow
    ids: Tensor
    per_token: dict[str, Tensor]
    sha256: str


def with_pictures(
    windows: TokenSet,
    rows: Sequence[IllustratedRow],
    reader: RowReader,
    config: PretrainedConfig,
    seed: int,
) -> TokenSet:
    """Windows of text whose beginnings are replaced by rows with their pictures, in a seeded order,
    rows again where they are fewer than windows. Rows that are longer than a window, or that the
    chat template refuses, are left out. Raises `LlmqError` where all are."""
    n = len(windows.tokens)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    found = _fitting(windows, [rows[index] for index in order], reader)
    heads = found.heads
    chosen = [heads[index % len(heads)] for index in range(n)]
    tokens = windows.tokens.clone()
    per_token = {name: torch.zeros_like(tokens) for name in sorted(heads[0].per_token)}
    places = place_ids(config, reader.processor)
    for index, head in enumerate(chosen):
        end = len(head.ids)
        of_text = head.ids[~torch.isin(head.ids, places)]
        check_vocabulary(of_text, config.get_text_config().vocab_size, windows.source)
        tokens[index, :end] = head.ids
        for name, values in per_token.items():
            values[index, :end] = head.per_token[name]
    inputs = PictureInputs(
        reader,
        tuple(head.row for head in chosen),
        per_token,
        {head.row.where: _digests(head.row) for head in heads},
        hashlib.sha256("\n".join(head.sha256 for head in chosen).encode()).hexdigest(),
    )
    read = _told(dict(windows.read), found, chosen, reader)
    return replace(windows, tokens=tokens, pictures=inputs, read=read)


@dataclass
class _Fitting:
    """Rows that windows can begin with, at most one for each, and those that were left out: their
    lengths, and what the chat template said."""

    heads: list[_Head] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    refused: list[RefusedError] = field(default_factory=list)


def _fitting(windows: TokenSet, rows: Sequence[IllustratedRow], reader: RowReader) -> _Fitting:
    n, length = windows.tokens.shape
    found = _Fitting()
    for row in rows:
        if len(found.heads) == n:
            break
        try:
            head = _head(reader, row)
        except RefusedError as error:
            found.refused.append(error)
            continue
        if len(head.ids) > length:
            found.too_long.append(len(head.ids))
        else:
            found.heads.append(head)
    if found.heads:
        return found
    if not found.too_long:
        raise found.refused[0]
    raise LlmqError(
        f"{windows.source}: all {len(found.too_long)} rows with pictures are longer than a window "
        f"of {length} tokens; the shortest needs --sequence-length {min(found.too_long)}, all of "
        f"them {max(found.too_long)}"
    )


def _told(
    read: dict[str, Any], found: _Fitting, chosen: Sequence[_Head], reader: RowReader
) -> dict[str, Any]:
    """What was read, with what a report says of pictures."""
    left_out = {
        "longer than a window": len(found.too_long),
        "refused by the chat template": len(found.refused),
        **read.pop(LEFT_OUT, {}),
    }
    told = {
        "windows": len(chosen),
        "pictures": sum(len(head.row.pictures) for head in chosen),
        "rows": len(found.heads),
        "left_out": {reason: count for reason, count in left_out.items() if count},
        "longest_row": max([*found.too_long, *(len(head.ids) for head in found.heads)]),
        "tokens_of_rows": sum(len(head.ids) for head in chosen),
        "processor": type(reader.processor).__name__,
    }
    return {**read, "pictures": told}


def _head(reader: RowReader, row: IllustratedRow) -> _Head:
    found = reader.read([row])
    ids = found["input_ids"][0]
    per_token, others = {}, hashlib.sha256()
    for name in sorted(found.keys() - set(_LEFT_OUT)):
        value = found[name]
        if not isinstance(value, Tensor):
            raise LlmqError(
                f"{row.where}: {type(reader.processor).__name__} makes {name} a "
                f"{type(value).__name__}, expected a tensor; calibrate on the text alone: "
                "FILE#COLUMN"
            )
        if name in PER_TOKEN:
            per_token[name] = value[0]
        elif value.dim() > 1 and value.shape[:2] == (1, len(ids)):
            raise LlmqError(
                f"{row.where}: {type(reader.processor).__name__} says something of every token "
                f"({name}) that is not known for the text behind it; calibrate on the text alone: "
                "FILE#COLUMN"
            )
        others.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        others.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return _Head(row, ids, per_token, others.hexdigest())


def _digests(row: IllustratedRow) -> list[str]:
    return [picture.digest() for picture in row.pictures]
