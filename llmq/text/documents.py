"""Calibration and evaluation text: the bundled text, local files, folders, or data sets of the Hub,
as tokens with a fingerprint.

bundled                        sources of the standard library (see `llmq.text.corpus`); the default
notes.txt, rows.jsonl, x.parquet, or a folder of them; jsonl and parquet hold a column `text`
Salesforce/wikitext:wikitext-2-raw-v1:train    a Hub data set, with configuration and split
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError, LlmqWarning
from llmq.messages import brief
from llmq.storage.boundary import check_regular, reading
from llmq.text.corpus import standard_library_documents
from llmq.text.files import READERS, read_documents, texts

BUNDLED = "bundled"
MAX_HUB_DOCUMENTS = 20_000
_TOKENIZER_REMEDY = "put the model's own tokenizer files into its folder"


def load_documents(
    source: str, split: Literal["train", "calibration", "eval"], revision: str | None = None
) -> list[str]:
    """The documents of a source, empty rows included: joined by blank lines they are the text that
    published perplexities are measured on (a third of WikiText-2's rows are empty).

    split: which part of the bundled text. Of a Hub data set the first `MAX_HUB_DOCUMENTS` are read,
    since some have no end that could be waited for, and a warning tells when there are more. Raises
    `LlmqError` for what cannot be found or read."""
    if source == BUNDLED:
        return standard_library_documents(split)
    path = Path(source)
    if path.exists() and not path.is_dir():
        check_regular(path)
    if path.is_dir():
        with reading(path, "not a folder that can be listed", "check its permissions"):
            paths = sorted(p for p in path.iterdir() if p.suffix in {".txt", *READERS})
        if not paths:
            raise LlmqError(f"{source}: no .txt, .jsonl or .parquet file in this folder")
        documents = [document for p in paths for document in read_documents(p)]
    elif path.is_file():
        documents = read_documents(path)
    elif path.suffix in {".txt", *READERS} or path.is_absolute() or source.startswith("."):
        raise LlmqError(
            f"{source}: no such file; give a .txt, .jsonl or .parquet file, a folder of them, a "
            f"Hub data set (name:config:split) or '{BUNDLED}'"
        )
    else:
        documents = _read_hub(source, revision)
    if not any(document.strip() for document in documents):
        raise LlmqError(f"{source}: holds no text")
    return documents


def _read_hub(source: str, revision: str | None) -> list[str]:
    from datasets import load_dataset

    name, config, split = ([*source.split(":"), "", ""])[:3]
    try:
        rows = load_dataset(
            name, config or None, split=split or "train", streaming=True, revision=revision
        )
        documents = texts(islice(rows, MAX_HUB_DOCUMENTS + 1), source)
    except LlmqError:
        raise
    # datasets raises whatever its file systems raise; each means that the data cannot be had.
    except Exception as error:
        raise LlmqError(
            f"{source}: not a file here, and as a Hub data set it failed ({type(error).__name__}: "
            f"{brief(error)}); expected name:config:split"
        ) from None
    if len(documents) > MAX_HUB_DOCUMENTS:
        warnings.warn(
            f"{source}: the first {MAX_HUB_DOCUMENTS} documents are used; the data set has more",
            LlmqWarning,
            stacklevel=3,
        )
    return documents[:MAX_HUB_DOCUMENTS]


@dataclass(frozen=True)
class TokenSet:
    """Token windows int64 `[n, length]`, where they came from and a hash that two equal sets
    share. tokenizer_sha256: of the vocabulary that they are tokens of, where it is known."""

    tokens: Tensor
    source: str
    tokenizer_sha256: str | None = None

    @property
    def sha256(self) -> str:
        return token_hash(self.tokens)

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
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(len(tokens) - length + 1, (n_samples,), generator=generator)
    windows = tokens[offsets[:, None] + torch.arange(length)]
    if bos is not None:
        windows[:, 0] = bos
    return TokenSet(windows, source)
