"""What a protocol is, and how windows are cut by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmq.arguments import check_type
from llmq.errors import LlmqError
from llmq.models.arch import USUAL_LENGTH, check_length, position_limit
from llmq.text.encoding import Encoded
from llmq.text.windows import IGNORED, Bos, Parts, Windows, identified


@dataclass(frozen=True)
class Settings:
    """sequence_length: tokens that a model reads at a time. stride: tokens from one window to the
    next, where a protocol has such. bos: see `llmq.text.windows.cut_windows`."""

    sequence_length: int
    stride: int | None = None
    bos: Bos = "auto"


Cut: TypeAlias = Callable[[list[str], PreTrainedTokenizerBase, Any, Settings], Windows]


@dataclass(frozen=True)
class Protocol:
    """cut: documents, tokenizer, config and settings -> windows, with the predictions that count.
    unit: what the perplexity is per. usual_length: of windows where nobody says it, if the model
    has positions for so many. least_length: that has something to predict. usual_stride: None
    where there is no stride."""

    name: str
    cut: Cut
    unit: Literal["token", "word"] = "token"
    usual_length: int = USUAL_LENGTH
    least_length: int = 2
    usual_stride: int | None = None

    def windows(
        self,
        documents: list[str],
        tokenizer: PreTrainedTokenizerBase,
        config: Any,
        *,
        sequence_length: int | None = None,
        stride: int | None = None,
        bos: Bos = "auto",
    ) -> Windows:
        """The windows of a text. sequence_length, stride: None for the usual ones. Raises
        `LlmqError` for too little text, windows longer than the model has positions for, and a
        stride that does not go with them."""
        settings = self.settings(config, sequence_length, stride, bos)
        return self.cut(documents, tokenizer, config, settings)

    def settings(self, config: Any, length: int | None, stride: int | None, bos: Bos) -> Settings:
        """What windows are cut by."""
        if length is None:
            length = min(self.usual_length, position_limit(config) or self.usual_length)
        check_type("sequence_length", length, int, "a whole number of tokens")
        if length < self.least_length:
            raise LlmqError(
                f"--sequence-length {length}: protocol {self.name} needs windows of "
                f"{self.least_length} tokens or more"
            )
        check_length(config, length, f"--sequence-length {length}")
        return Settings(length, self._stride(length, stride), bos)

    def _stride(self, length: int, stride: int | None) -> int | None:
        if self.usual_stride is None:
            if stride is not None:
                raise LlmqError(
                    f"--stride {stride}: protocol {self.name} has none; use --protocol strided, or "
                    "leave --stride out"
                )
            return None
        if stride is None:
            return min(self.usual_stride, length // 2)
        check_type("stride", stride, int, "a whole number of tokens")
        if not 1 <= stride <= length:
            raise LlmqError(
                f"--stride {stride}: expected 1 to {length}, the tokens of a window; with more, "
                "tokens between two windows would not be scored"
            )
        return stride


@dataclass(frozen=True)
class Span:
    """A window of a row of tokens: the model reads from `start` on and is scored on the tokens from
    `first` to before `end`."""

    start: int
    first: int
    end: int


def read_spans(row: Tensor, spans: Sequence[Span], length: int) -> tuple[Tensor, Tensor]:
    """Tokens that a model reads, and what each position is to predict, int64 `[n, length]` each,
    both filled up at the end, where causal models do not look. row: int64 `[n_tokens]`."""
    tokens = torch.zeros(len(spans), length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for i, span in enumerate(spans):
        n_read = span.end - 1 - span.start
        tokens[i, :n_read] = row[span.start : span.end - 1]
        targets[i, span.first - 1 - span.start : n_read] = row[span.first : span.end]
    return tokens, targets


def span_bytes(row: Encoded, spans: Sequence[Span]) -> Tensor | None:
    """Bytes of the text that each window is scored on, int64 `[n]`."""
    if row.n_bytes is None:
        return None
    return torch.stack([row.n_bytes[span.first : span.end].sum() for span in spans])


def row_windows(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    row: Encoded,
    spans: Sequence[Span],
    policy: str,
) -> Windows:
    """Windows of one row of tokens, which begins with BOS unless the policy is "none"; by
    "every-window" it takes the first place in each."""
    length = max(span.end - 1 - span.start for span in spans)
    tokens, targets = read_spans(row.tokens, spans, length)
    if policy == "every-window":
        tokens[:, 0] = row.tokens[0]
    windows = identified(tokens, policy, documents, tokenizer)
    parts = Parts.windows(span_bytes(row, spans), len(spans))
    return replace(windows, targets=targets, parts=parts)


def check_enough(n_tokens: int, n_needed: int, protocol: str) -> None:
    """Raise `LlmqError` for too little text."""
    if n_tokens < n_needed:
        raise LlmqError(
            f"evaluation text: {n_tokens} tokens, but protocol {protocol} needs {n_needed}; give "
            "more text or a smaller --sequence-length"
        )
