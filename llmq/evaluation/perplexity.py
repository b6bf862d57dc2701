"""Perplexity by a named protocol, with an interval and everything that identifies the figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmq.errors import LlmqError
from llmq.evaluation.bootstrap import mean_interval, reported_interval
from llmq.text.documents import check_vocabulary
from llmq.text.windows import Bos, Windows, cut_windows

TOKENS_PER_BATCH = 4096
MOST_LOGITS = 1 << 26  # of a batch: 268 MB in float32; a vocabulary of 262,144 makes it 256 tokens


@dataclass(frozen=True)
class Perplexity:
    """value and 95% interval; window_nll: mean negative log-likelihood of each window, float64
    `[n]`, in nats per token."""

    value: float
    ci95: tuple[float, float]
    window_nll: Tensor
    windows: Windows
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {
            "perplexity": self.value,
            "ci95": reported_interval(self.ci95, len(self.window_nll)),
            "dtype": self.dtype,
            **self.windows.identity(),
        }


def perplexity_ratio(base: Perplexity, other: Perplexity) -> dict[str, Any]:
    """How many times as high another model's perplexity is on the same windows, with the paired 95%
    interval, which is narrower than those of either."""
    log_ratio = other.window_nll - base.window_nll
    interval = map(math.exp, mean_interval(log_ratio))
    return {
        "perplexity_ratio": math.exp(log_ratio.mean()),
        "perplexity_ratio_ci95": reported_interval(interval, len(log_ratio)),
    }


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


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    windows: Windows,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_losses: Callable[[Tensor], object] = lambda losses: None,
) -> Perplexity:
    """Score the windows. on_batch: told how many windows are done, of how many. on_losses: gets the
    negative log-likelihoods of each batch, `[B, T - 1]`. Raises `LlmqError` for token ids beyond
    the vocabulary and for NaN logits."""
    vocab_size = model.config.get_text_config().vocab_size
    check_vocabulary(windows.tokens, vocab_size, "evaluation text")
    losses: list[Tensor] = []
    batch_size = windows_per_batch(windows.tokens.shape[1], vocab_size)
    for batch in windows.tokens.split(batch_size):
        batch = batch.to(model.device)
        loss = token_nll(model(input_ids=batch, use_cache=False).logits, batch)
        if not bool(torch.isfinite(loss).all()):
            raise LlmqError(
                f"window {len(losses) * batch_size}: the model's logits are "
                f"{not_finite(model.dtype)}"
            )
        losses.append(loss.double().mean(dim=1).cpu())
        on_losses(loss.cpu())
        on_batch(min(len(losses) * batch_size, len(windows.tokens)), len(windows.tokens))
    nll = torch.cat(losses)
    low, high = mean_interval(nll)
    return Perplexity(
        math.exp(nll.mean()),
        (math.exp(low), math.exp(high)),
        nll,
        windows,
        str(model.dtype).removeprefix("torch."),
    )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    sequence_length: int = 2048,
    bos: Bos = "auto",
) -> Perplexity:
    """Perplexity of a model on a text by protocol `gptq`: disjoint windows of `sequence_length`
    tokens, all but the first token of each scored."""
    return evaluate(model, cut_windows([text], tokenizer, model.config, sequence_length, bos))
