"""Perplexity by a named protocol, with an interval and everything that identifies the figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmq.errors import LlmqError
from llmq.evaluation.bootstrap import (
    MOST_NATS,
    mean_interval,
    perplexity_of,
    ratio_interval,
    reported_interval,
)
from llmq.evaluation.protocols import protocol_named
from llmq.text.documents import check_vocabulary
from llmq.text.windows import IGNORED, Windows

TOKENS_PER_BATCH = 4096
MOST_LOGITS = 1 << 26  # of a batch: 268 MB in float32; a vocabulary of 262,144 makes it 256 tokens


@dataclass(frozen=True)
class Perplexity:
    """value and 95% interval, per what the protocol counts, its `unit`; window_nll: mean negative
    log-likelihood of each window, float64 `[n]`, in nats per token."""

    value: float
    ci95: tuple[float, float]
    window_nll: Tensor
    windows: Windows
    dtype: str
    unit: Literal["token", "word"] = "token"

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all that was scored, in nats."""
        return float((self.window_nll * targets_per_window(self.windows)).sum())

    @property
    def token_perplexity(self) -> float:
        return exp(self.nll / self.windows.n_targets)

    @property
    def word_perplexity(self) -> float | None:
        """None where the protocol does not count words."""
        return self.value if self.unit == "word" else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the UTF-8 of the text that was scored; None where only tokens are known of it, or a
        tokenizer does not say where they stand."""
        parts = self.windows.parts
        if parts is None or parts.n_bytes is None or not int(parts.n_bytes.sum()):
            return None
        return self.nll / math.log(2) / int(parts.n_bytes.sum())

    def to_json(self) -> dict[str, Any]:
        """None for what is not known, and for more than a float holds."""
        bits = self.bits_per_byte
        figures = {
            "perplexity": self.value,
            "token_perplexity": self.token_perplexity if self.unit == "word" else self.value,
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": None if bits is None else exp(bits * math.log(2)),
            "bits_per_byte": bits,
        }
        is_bounded = math.isfinite(self.ci95[1])
        return {
            **{name: None if value == math.inf else value for name, value in figures.items()},
            "ci95": reported_interval(self.ci95, self.windows.n_parts) if is_bounded else None,
            "unit": self.unit,
            "dtype": self.dtype,
            **self.windows.identity(),
        }


def perplexity_ratio(base: Perplexity, other: Perplexity) -> dict[str, Any]:
    """How many times as high another model's perplexity is on the same windows, with the paired 95%
    interval, which is narrower than those of either."""
    log_ratio = other.window_nll - base.window_nll
    interval = map(perplexity_of, mean_interval(log_ratio))
    return {
        "perplexity_ratio": perplexity_of(float(log_ratio.mean())),
        "perplexity_ratio_ci95": reported_interval(interval, len(log_ratio)),
    }


def exp(nats: float) -> float:
    """inf for more than a float holds: where a text has no spaces, a word is a whole document."""
    return math.exp(nats) if nats < MOST_NATS else math.inf


def windows_per_batch(length: int, vocab_size: int, most_tokens: int = TOKENS_PER_BATCH) -> int:
    """How many windows of `length` tokens go through a model together. With large vocabularies it
    is their logits that decide what memory a batch takes."""
    return max(1, min(most_tokens, MOST_LOGITS // vocab_size) // length)


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in float32 of each target, `[B, T - 1]`, from logits `[B, T, V]`. One
    window at a time: the float32 copy is what costs memory."""
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(losses)


def target_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in float32 of each target, `[B, T]`, from logits `[B, T, V]`; 0 where
    a target is `IGNORED`."""
    losses = [
        torch.nn.functional.cross_entropy(
            row.float(), wanted, reduction="none", ignore_index=IGNORED
        )
        for row, wanted in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses)


def targets_per_window(windows: Windows) -> Tensor:
    """How many targets count, int64 `[n]`."""
    if windows.targets is not None:
        return (windows.targets != IGNORED).sum(dim=1)
    n, length = windows.tokens.shape
    return torch.full((n,), length - 1)


def not_finite(dtype: torch.dtype) -> str:
    """What logits that are no numbers are, and what to do: a wider dtype helps an overflow, nothing
    helps bad weights."""
    remedy = (
        "the checkpoint itself is at fault: see how it was made ('llmq inspect'), then make or "
        "download it again"
        if dtype == torch.float32
        else "try --dtype float32"
    )
    return f"NaN or infinite in {str(dtype).removeprefix('torch.')}; {remedy}"


def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_losses: Callable[[Tensor], object] = lambda losses: None,
) -> Perplexity:
    """Score the windows. Takes and raises what `window_losses` does."""
    means = window_losses(model, windows, on_batch, on_losses)
    return _summarized(means, windows, str(model.dtype).removeprefix("torch."))


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    windows: Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_losses: Callable[[Tensor], object] = lambda losses: None,
) -> Tensor:
    """Mean negative log-likelihood of the targets of each window in nats, float64 `[n]`. on_batch:
    told how many windows are done, of how many. on_losses: gets those of each batch, `[B, T - 1]`,
    or `[B, T]` of windows with targets. Raises `LlmqError` for token ids beyond the vocabulary and
    for NaN logits."""
    vocab_size = model.config.get_text_config().vocab_size
    check_vocabulary(windows.tokens, vocab_size, "evaluation text")
    means: list[Tensor] = []
    n, batch_size = len(windows.tokens), windows_per_batch(windows.tokens.shape[1], vocab_size)
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        targets = None if windows.targets is None else windows.targets[rows]
        loss, mean = _batch_losses(model, windows.tokens[rows], targets)
        if not bool(torch.isfinite(loss).all()):
            raise LlmqError(f"window {start}: the model's logits are {not_finite(model.dtype)}")
        means.append(mean.cpu())
        on_losses(loss.cpu())
        on_batch(min(start + batch_size, n), n)
    return torch.cat(means)


def _batch_losses(
    model: PreTrainedModel, tokens: Tensor, targets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses `[B, ...]` of windows of tokens `[B, T]`, and their means, float64 `[B]`."""
    if targets is None:
        tokens = tokens.to(model.device)
        loss = token_nll(model(input_ids=tokens, use_cache=False).logits, tokens)
        return loss, loss.double().mean(dim=1)
    counts = targets != IGNORED
    n_read = int(counts.any(dim=0).nonzero().max()) + 1  # what is behind is there to fill up
    logits = model(input_ids=tokens[:, :n_read].to(model.device), use_cache=False).logits
    loss = target_nll(logits, targets[:, :n_read].to(model.device))
    return loss, loss.double().sum(dim=1) / counts.sum(dim=1).to(loss.device)


def _summarized(means: Tensor, windows: Windows, dtype: str) -> Perplexity:
    """The figure of mean losses by window, float64 `[n]`."""
    unit = protocol_named(windows.protocol).unit
    parts = windows.parts
    if windows.targets is None or parts is None:
        mean, (low, high) = float(means.mean()), mean_interval(means)
    else:
        n_targets = targets_per_window(windows)
        sums = torch.zeros(windows.n_parts, dtype=torch.float64)
        sums.index_add_(0, parts.of_window, means * n_targets)
        sizes = n_targets if parts.n_words is None else parts.n_words
        mean, (low, high) = float(sums.sum() / sizes.sum()), ratio_interval(sums, sizes)
    return Perplexity(exp(mean), (exp(low), exp(high)), means, windows, dtype, unit)
