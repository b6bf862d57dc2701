"""Evaluation windows: what of a text a model reads at a time, and which of its predictions count,
with BOS handled in the open.

Here is protocol `gptq`, the default: all documents joined by blank lines, tokenized once, cut into
disjoint windows of T tokens, the tail dropped, T - 1 targets each. The others are in
`llmq.evaluation.protocols`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.models.arch import check_length, needs_bos
from llmq.models.tokens import bos_token, fingerprint, first_token
from llmq.text.documents import token_hash
from llmq.text.encoding import Encoded, encode

Bos = Literal["auto", "every-window", "start", "none"]
BOS_POLICIES = ("auto", "every-window", "start", "none")
IGNORED = -100  # a target that does not count, as torch's cross entropy has it


@dataclass(frozen=True)
class Parts:
    """The parts of a text that losses are added up and resampled by: its windows, or for protocol
    `words` its documents. of_window: the part of each window, int64 `[n]`, in ascending order.
    n_bytes, n_words: of what is scored of each part, int64 `[m]`, None where that is not known."""

    of_window: Tensor
    n_bytes: Tensor | None = None
    n_words: Tensor | None = None

    @classmethod
    def windows(cls, n_bytes: Tensor | None, n: int) -> Parts:
        """Every window its own."""
        return cls(torch.arange(n), n_bytes)

    def first(self, n_windows: int) -> Parts:
        """Those that begin in the first windows."""
        of_window = self.of_window[self.of_window <= self.of_window[:n_windows][-1]]
        n = int(of_window[-1]) + 1
        n_bytes, n_words = (
            None if each is None else each[:n] for each in (self.n_bytes, self.n_words)
        )
        return Parts(of_window, n_bytes, n_words)


@dataclass(frozen=True)
class Windows:
    """tokens: int64 `[n, T]`, what a model reads. bos: the policy that was applied, "none" where
    nothing was added. The hashes identify text and tokenizer, None where tokens were given. read:
    what was read of the source of the text, where that is known.

    targets: what each position is to predict, int64 `[n, T]`, `IGNORED` where that does not count;
    None for the next token of the window. parts: of the text, where there is one. settings: what
    else of the protocol decides the figure."""

    tokens: Tensor
    bos: str
    text_sha256: str | None
    tokenizer_sha256: str | None
    read: dict[str, Any] = field(default_factory=dict)
    protocol: str = "gptq"
    targets: Tensor | None = None
    parts: Parts | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sequence_length(self) -> int:
        """Tokens per window, by which the protocol was asked to cut."""
        return int(self.settings.get("sequence_length", self.tokens.shape[1]))

    @property
    def n_targets(self) -> int:
        if self.targets is not None:
            return int((self.targets != IGNORED).sum())
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    @property
    def n_parts(self) -> int:
        """Windows, or documents where these are scored as wholes."""
        return len(self.tokens) if self.parts is None else int(self.parts.of_window[-1]) + 1

    def first(self, n: int | None) -> Windows:
        """The first n windows, None for all, and the rest of the document that the last of them
        lies in where documents are scored as wholes."""
        if n is None or n >= len(self.tokens):
            return self
        parts = None if self.parts is None else self.parts.first(n)
        n = n if parts is None else len(parts.of_window)
        targets = None if self.targets is None else self.targets[:n]
        return replace(self, tokens=self.tokens[:n], targets=targets, parts=parts)

    def identity(self) -> dict[str, Any]:
        """What a figure measured on these windows has to carry."""
        text = {"text": self.read} if self.read else {}
        is_by_document = self.parts is not None and self.parts.n_words is not None
        documents = {"documents": self.n_parts} if is_by_document else {}
        return {
            "protocol": self.protocol,
            "sequence_length": self.sequence_length,
            **self.settings,
            **documents,
            "windows": self.tokens.shape[0],
            "tokens": self.n_targets,
            "bos": self.bos,
            "text_sha256": self.text_sha256,
            "tokens_sha256": token_hash(self.tokens),
            "tokenizer_sha256": self.tokenizer_sha256,
            **text,
        }


def identified(
    tokens: Tensor, bos: str, documents: list[str], tokenizer: PreTrainedTokenizerBase
) -> Windows:
    """Windows with the hashes of the text and the tokenizer that they come from."""
    text_hash = hashlib.sha256("\n\n".join(documents).encode("utf-8", "surrogatepass")).hexdigest()
    return Windows(tokens, bos, text_hash, fingerprint(tokenizer))


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that a tokenizer puts before a text by itself; None for one that does not."""
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]:
        return int(begin)
    return None


def resolve_bos(
    bos: Bos, tokenizer: PreTrainedTokenizerBase, config: Any
) -> tuple[str, int | None]:
    """The policy that a text is read by, and the token that it takes: "every-window" for the
    families that are broken without it, or where it is asked for; "start" with what the tokenizer
    adds by itself; else "none". Raises `LlmqError` where a token is asked for that there is not."""
    if bos not in BOS_POLICIES:
        raise LlmqError(f"--bos {bos}: expected one of {', '.join(BOS_POLICIES)}")
    if bos == "every-window" or (bos == "auto" and needs_bos(config)):
        begin = first_token(tokenizer, config)
        begin = bos_token(tokenizer, config) if begin is None else begin
        if begin is None:
            raise LlmqError(
                "--bos every-window: neither this tokenizer nor config.json has a BOS token; use "
                "--bos start or none"
            )
        return "every-window", begin
    added = None if bos == "none" else added_bos(tokenizer)
    return "none" if added is None else "start", added


def cut_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    sequence_length: int,
    bos: Bos = "auto",
) -> Windows:
    """Windows of `sequence_length` tokens.

    bos: "start", what the tokenizer adds at the start of a text, once; "none", nothing;
    "every-window", a BOS token before each T - 1 tokens of text; "auto", "every-window" for the
    families that are broken without it, else "start". Raises `LlmqError` for a text shorter than
    one window, windows longer than the model has positions for, or a tokenizer without BOS where
    one is asked for."""
    check_length(config, sequence_length, f"--sequence-length {sequence_length}")
    policy, begin = resolve_bos(bos, tokenizer, config)
    # An EOS that a tokenizer would add at the end of the text is no text.
    row = encode("\n\n".join(documents), tokenizer)
    if policy == "every-window":
        assert begin is not None
        body = cut_row(row.tokens, sequence_length - 1)
        tokens = torch.cat([torch.full((len(body), 1), begin), body], dim=1)
        n_bytes = _bytes_of_windows(row, sequence_length - 1, n_unscored=0)
    else:
        row = row.begun_with(begin)
        tokens = cut_row(row.tokens, sequence_length)
        n_bytes = _bytes_of_windows(row, sequence_length, n_unscored=1)
    windows = identified(tokens, policy, documents, tokenizer)
    return replace(windows, parts=Parts.windows(n_bytes, len(tokens)))


def _bytes_of_windows(row: Encoded, length: int, n_unscored: int) -> Tensor | None:
    """Bytes of text behind the first tokens of each window."""
    if row.n_bytes is None:
        return None
    return cut_row(row.n_bytes, length)[:, n_unscored:].sum(dim=1)


def cut_row(row: Tensor, length: int) -> Tensor:
    """Disjoint windows `[n, length]` of a row of tokens, its tail dropped. Raises `LlmqError` where
    there is not one."""
    n = len(row) // length
    if n == 0:
        raise LlmqError(
            f"evaluation text: {len(row)} tokens, but one window needs {length}; give more text or "
            "a smaller --sequence-length"
        )
    return row[: n * length].view(n, length)
