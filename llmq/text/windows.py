"""Evaluation windows: how a text becomes the token windows that a perplexity protocol scores, with
BOS handled in the open.

Protocol `gptq`: all documents joined by blank lines, tokenized once, cut into disjoint windows of T
tokens, the tail dropped, T - 1 targets each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.models.arch import check_length, needs_bos
from llmq.models.tokens import bos_token, fingerprint, first_token
from llmq.text.documents import token_hash, tokenize

Bos = Literal["auto", "every-window", "start", "none"]
BOS_POLICIES = ("auto", "every-window", "start", "none")


@dataclass(frozen=True)
class Windows:
    """tokens: int64 `[n, T]`. bos: the policy that was applied. The hashes identify text and
    tokenizer, None where tokens were given. read: what was read of the source of the text, where
    that is known."""

    tokens: Tensor
    bos: str
    text_sha256: str | None
    tokenizer_sha256: str | None
    read: dict[str, Any] = field(default_factory=dict)

    @property
    def n_targets(self) -> int:
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    def identity(self) -> dict[str, Any]:
        """What a figure measured on these windows has to carry."""
        text = {"text": self.read} if self.read else {}
        return {
            "protocol": "gptq",
            "sequence_length": self.tokens.shape[1],
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
    if bos not in BOS_POLICIES:
        raise LlmqError(f"--bos {bos}: expected one of {', '.join(BOS_POLICIES)}")
    check_length(config, sequence_length, f"--sequence-length {sequence_length}")
    policy = ("every-window" if needs_bos(config) else "start") if bos == "auto" else bos
    row = tokenize(documents, tokenizer)
    begin = tokenizer.bos_token_id
    if policy == "every-window":
        begin = first_token(tokenizer, config) or bos_token(tokenizer, config)
        if begin is None:
            raise LlmqError(
                "--bos every-window: neither this tokenizer nor config.json has a BOS token; use "
                "--bos start or none"
            )
        body = cut_row(row, sequence_length - 1)
        tokens = torch.cat([torch.full((len(body), 1), begin), body], dim=1)
    else:
        # Some tokenizers add BOS by themselves; an EOS that they would add at the end of the text
        # is no text.
        if (
            policy == "start"
            and begin is not None
            and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
        ):
            row = torch.cat([torch.tensor([begin]), row])
        tokens = cut_row(row, sequence_length)
    return identified(tokens, policy, documents, tokenizer)


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
