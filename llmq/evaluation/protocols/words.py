"""Protocol `words`, that of lm-eval's task `wikitext`: every document on its own, all of its tokens
scored, the losses divided by its words or bytes, so that models with other tokenizers compare.

Each document begins with BOS, or with EOS where there is no BOS. The windows of a document predict
its tokens without a gap; each begins with the last token of the one before as its only context, and
the last window reaches back until it has T tokens. A text with WikiText's marks is read as it was
before WikiText took it apart into words; words and bytes are counted as WikiText has them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.evaluation.protocols.base import Protocol, Settings, Span, read_spans
from llmq.text.encoding import encode
from llmq.text.windows import Parts, Windows, identified, resolve_bos

# How WikiText writes, and how the text was, in the order in which it is put back.
_MARKS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_HEADINGS_AND_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True)
class Document:
    """text: as it was given. tokens, targets: its windows, int64 `[n, T]` each."""

    text: str
    tokens: Tensor
    targets: Tensor


def is_wikitext(documents: Iterable[str]) -> bool:
    """Whether a text has marks that nobody else writes."""
    return any(f" @{mark}@ " in document for document in documents for mark in "-,.")


def as_written(text: str) -> str:
    """A document without the spaces and marks of WikiText's tokens."""
    for found, written in _MARKS:
        text = text.replace(found, written)
    for opening, closing in _PAIRS:
        pair = rf"\{opening}([^\{closing}]*)\{closing}"
        text = re.sub(pair, lambda match: f"{match[0][0]}{match[1].strip()}{match[0][-1]}", text)
    for found, written in _HEADINGS_AND_REST:
        text = text.replace(found, written)
    return text


def n_words(text: str) -> int:
    """Words of a document, as lm-eval counts them: one more than there are runs of white space."""
    return 1 + sum(1 for _ in re.finditer(r"\s+", text))


def spans_of(n_tokens: int, length: int) -> list[Span]:
    """Windows of a document, whose first token is context: up to `length` tokens are read, and as
    many predicted; the last one reads as many of those before as there is place for."""
    spans = []
    for first in range(1, n_tokens, length):
        end = min(first + length, n_tokens)
        spans.append(Span(max(0, end - 1 - length), first, end))
    return spans


def cut(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, config: Any, settings: Settings
) -> Windows:
    """The windows of a text. Raises `LlmqError` where no document has a token to predict."""
    policy, begin = _prefix(tokenizer, config, settings)
    length = settings.sequence_length
    detokenised = is_wikitext(documents)
    read: list[Document] = []
    for document in documents:
        text = as_written(document) if detokenised else document
        row = encode(text, tokenizer).begun_with(begin).tokens
        spans = spans_of(len(row), length) if document.strip() else []
        if spans:
            tokens, targets = read_spans(row, spans, length)
            if policy == "every-window":
                tokens[:, 0] = row[0]
            read.append(Document(document, tokens, targets))
    if not read:
        raise LlmqError(
            f"evaluation text: protocol {PROTOCOL.name} needs 1 document with a token to predict, "
            f"found 0 among {len(documents)}; give more text"
        )
    tokens = torch.cat([document.tokens for document in read])
    return replace(
        identified(tokens, policy, documents, tokenizer),
        targets=torch.cat([document.targets for document in read]),
        parts=_parts(read),
        protocol=PROTOCOL.name,
        settings={
            "sequence_length": length,
            "documents_of_text": len(documents),
            "documents_without_tokens": len(documents) - len(read),
            "detokenised": detokenised,
        },
    )


def _prefix(
    tokenizer: PreTrainedTokenizerBase, config: Any, settings: Settings
) -> tuple[str, int | None]:
    """What every document begins with, and the policy that this is."""
    policy, begin = resolve_bos(settings.bos, tokenizer, config)
    if policy == "every-window" or settings.bos == "none":
        return policy, begin
    if tokenizer.bos_token_id is not None:
        return "start", tokenizer.bos_token_id
    if tokenizer.eos_token_id is not None:
        return "start (EOS)", tokenizer.eos_token_id
    return "none", None


def _parts(read: list[Document]) -> Parts:
    """The documents, and how long each is in the text that was given."""
    n_windows = torch.tensor([len(document.tokens) for document in read])
    n_bytes = [len(document.text.encode("utf-8", "surrogatepass")) for document in read]
    return Parts(
        torch.arange(len(read)).repeat_interleave(n_windows),
        torch.tensor(n_bytes),
        torch.tensor([n_words(document.text) for document in read]),
    )


PROTOCOL = Protocol("words", cut, unit="word")
