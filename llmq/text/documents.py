"""Calibration and evaluation text: the bundled text, local files, folders, or data sets of the Hub,
as tokens with a fingerprint.

bundled                        sources of the standard library (see `llmq.text.corpus`)
python-docs                    its documentation (see `llmq.text.documentation`)
notes.txt, page.md, rows.jsonl(.gz), x.parquet, or a folder of them, or one that `save_to_disk` of
                               datasets wrote; which columns are read: see `llmq.text.rows`
Salesforce/wikitext:wikitext-2-raw-v1:train    a Hub data set, with configuration and split
rows.jsonl#body                a column of another name
ultrachat, c4, wikitext, code  what other toolkits calibrate on (see `llmq.text.presets`)
self                           written by the model itself (see `llmq.ptq.self_written`)
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError, LlmqWarning
from llmq.storage.boundary import check_regular, reading
from llmq.text.address import Address, Purpose
from llmq.text.corpus import BUNDLED as BUNDLED
from llmq.text.corpus import standard_library_documents
from llmq.text.documentation import DOCUMENTATION, documentation_documents
from llmq.text.files import READERS, TEXT_SUFFIXES, add_file, kind_of
from llmq.text.folders import add_folder
from llmq.text.held_out import HeldOutText, window_starts
from llmq.text.hub import add_hub
from llmq.text.illustrated import IllustratedRow
from llmq.text.presets import PRESETS, add_preset
from llmq.text.rows import Documents

if TYPE_CHECKING:
    from llmq.text.picture_windows import PictureInputs

SELF = "self"  # written by the model; see llmq.ptq.self_written
_TOKENIZER_REMEDY = "put the model's own tokenizer files into its folder"


@dataclass(frozen=True)
class Text:
    """documents: joined by blank lines they are the text. read: what was read of which rows and
    how, JSON-able. illustrated: rows with pictures, where these were asked for."""

    documents: list[str]
    read: dict[str, Any]
    illustrated: tuple[IllustratedRow, ...] = ()


def load_documents(source: str, purpose: Purpose, revision: str | None = None) -> list[str]:
    """The documents of a source, chats without a template; see `read_text`."""
    address = source if revision is None else _at_revision(source, revision)
    return read_text(address, purpose).documents


def _at_revision(source: str, revision: str) -> str:
    name, separator, rest = source.partition(":")
    return f"{name}@{revision}{separator}{rest}"


def read_text(
    source: str,
    purpose: Purpose,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    with_pictures: bool = False,
) -> Text:
    """The text of a source, empty rows included: joined by blank lines they are the text that
    published perplexities are measured on (a third of WikiText-2's rows are empty).

    purpose: which part of the bundled text, and which split where there are several. tokenizer:
    through whose chat template chats go. with_pictures: rows that have any are kept as such, too;
    without, a warning says how many are left aside. Raises `LlmqError` for what cannot be found or
    read."""
    if source == BUNDLED:
        documents = standard_library_documents(purpose)
        return Text(documents, {"source": BUNDLED, "rows": len(documents)})
    if source == DOCUMENTATION:
        documents = list(documentation_documents(is_evaluation=purpose == "eval"))
        return Text(documents, {"source": DOCUMENTATION, "rows": len(documents)})
    if source == SELF:
        raise LlmqError(
            f"{SELF}: a model can write its own text to be calibrated on (--calibration {SELF}, "
            "qat --train generated), not to be judged by; give another text"
        )
    if source in PRESETS:
        return _read_preset(source, purpose, tokenizer)
    address = Address.parse(source)
    collected = Documents(tokenizer, address.column, with_pictures)
    chosen = _collect(collected, address, purpose, source)
    if not any(document.strip() for document in collected.found):
        raise LlmqError(f"{source}: holds no text ({collected.summary()})")
    if collected.n_pictures and not with_pictures:
        warnings.warn(
            f"{source}: {collected.n_pictures} pictures are left aside, and the text beside them "
            "is read alone",
            LlmqWarning,
            stacklevel=3,
        )
    if with_pictures and collected.n_pictures and not collected.illustrated:
        raise LlmqError(
            f"{source}: no row has as many places for pictures (<image>, or parts of type image) "
            f"as pictures; leave the places out, or read the text alone: {source}#COLUMN"
        )
    read = {"source": _name(address), **collected.to_json(), **chosen}
    return Text(collected.found, read, tuple(collected.illustrated))


def _read_preset(name: str, purpose: Purpose, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    warn_of_path(name)
    collected = Documents(tokenizer)
    if purpose == "train":  # the first rows would be too few
        preset = PRESETS[name]
        address = Address(preset.dataset, config=preset.config, split=preset.split)
        chosen = {"dataset": preset.dataset, **add_hub(collected, address, purpose)}
    else:
        chosen = add_preset(collected, name, purpose)
    if not any(document.strip() for document in collected.found):
        raise LlmqError(f"{name}: holds no text ({collected.summary()})")
    return Text(collected.found, {"source": name, **collected.to_json(), **chosen})


def warn_of_path(name: str) -> None:
    """Warn where something lies here that has the name of a text."""
    if Path(name).exists():
        warnings.warn(
            f"{name}: the text of this name is taken; for what lies here write ./{name}",
            LlmqWarning,
            stacklevel=4,
        )


def _collect(
    documents: Documents, address: Address, purpose: Purpose, source: str
) -> dict[str, Any]:
    """Collect what lies at an address, and return what was chosen of it."""
    path = Path(address.name)
    if path.exists() and not path.is_dir():
        check_regular(path)
    if path.is_dir():
        return add_folder(documents, address, purpose)
    if path.is_file():
        add_file(documents, path)
        return {}
    is_path = path.suffix in TEXT_SUFFIXES or kind_of(path) in READERS
    if is_path or path.is_absolute() or source.startswith("."):
        raise LlmqError(
            f"{source}: no such file; give a .txt, .md, .jsonl or .parquet file, a folder of them, "
            f"a Hub data set (name:config:split) or '{BUNDLED}'"
        )
    return add_hub(documents, address, purpose)


def _name(address: Address) -> str:
    """What reports call a text: the name of a file or folder, without saying where on this machine
    it lay, or the data set."""
    path = Path(address.name)
    return path.absolute().name if path.exists() else address.name


@dataclass(frozen=True)
class TokenSet:
    """Token windows int64 `[n, length]`, where they came from and a hash that two equal sets
    share. tokenizer_sha256: of the vocabulary that they are tokens of, where it is known. read:
    what was read of the source (see `Text`). held_out: windows that are not calibrated on, to
    measure on. pictures: what the windows hold beside tokens."""

    tokens: Tensor
    source: str
    tokenizer_sha256: str | None = None
    read: dict[str, Any] = field(default_factory=dict)
    held_out: tuple[HeldOutText, ...] = ()
    pictures: PictureInputs | None = None

    @classmethod
    def unread(cls, source: str, n_sequences: int, length: int) -> TokenSet:
        """Windows that stand for a text of which only the size matters."""
        return cls(torch.zeros((), dtype=torch.int64).expand(n_sequences, length), source)

    @property
    def sha256(self) -> str:
        tokens = token_hash(self.tokens)
        if self.pictures is None:
            return tokens
        return hashlib.sha256(f"{tokens} {self.pictures.sha256}".encode()).hexdigest()

    @property
    def n_tokens(self) -> int:
        return self.tokens.numel()


def token_hash(tokens: Tensor) -> str:
    """sha256 over shape and little-endian int64 values."""
    header = "x".join(map(str, tokens.shape)).encode()
    return hashlib.sha256(
        header + tokens.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    ).hexdigest()


def tokenize(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False
) -> Tensor:
    """The documents joined by blank lines as one row of tokens, int64 `[n]`."""
    where = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
    with reading(where, "this tokenizer cannot read the text", _TOKENIZER_REMEDY):
        ids = tokenizer(
            "\n\n".join(documents),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def check_vocabulary(tokens: Tensor, vocab_size: int, source: str) -> None:
    """Raise `LlmqError` when a token id lies beyond the model's embeddings."""
    smallest, largest = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if smallest < 0:
        raise LlmqError(
            f"{source}: token id {smallest} is negative; expected ids of the model's vocabulary of "
            f"{vocab_size}, padding left out"
        )
    if largest >= vocab_size:
        raise LlmqError(
            f"{source}: token id {largest} is beyond the model's vocabulary of {vocab_size}; the "
            "tokenizer does not belong to this model: put its own into the folder"
        )


def check_windows(tokens: Tensor, vocab_size: int) -> None:
    """Raise `LlmqError` for anything but windows of tokens, whole numbers `[n, length]` below
    `vocab_size`."""
    if tokens.dim() != 2 or not tokens.numel() or tokens.dtype not in (torch.int64, torch.int32):
        raise LlmqError(
            f"tokens: expected int64 of shape [n, length], got {tokens.dtype} of shape "
            f"{list(tokens.shape)}; llmq.text.documents.calibration_windows makes such"
        )
    check_vocabulary(tokens, vocab_size, "tokens")


def calibration_windows(
    tokens: Tensor, n_samples: int, length: int, seed: int, source: str, bos: int | None = None
) -> TokenSet:
    """`n_samples` windows at seeded random offsets of a row of tokens. bos: a token that takes the
    first place in every window, for models that need it.

    Raises `LlmqError` when the text is shorter than one window.
    """
    if len(tokens) < length:
        raise LlmqError(
            f"calibration text {source}: {len(tokens)} tokens, but one sequence needs {length}; "
            "give more text or a smaller --sequence-length"
        )
    offsets = window_starts(len(tokens), n_samples, length, seed)
    windows = tokens[offsets[:, None] + torch.arange(length)]
    if bos is not None:
        windows[:, 0] = bos
    return TokenSet(windows, source)
