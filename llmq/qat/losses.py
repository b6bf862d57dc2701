"""Distillation without the logits of a whole batch.

For 8 sequences of 2048 tokens and a vocabulary of 128k the float32 logits of one model take 8.4 GB,
and a plain loss keeps several copies of teacher's and student's. So the models stop at their last
hidden states; the heads run on chunks of tokens, and each chunk's logits are thrown away and
computed again in the backward pass. At no time do more than `CHUNK_TOKENS` rows exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmq.errors import LlmqError
from llmq.fields import check_fields

CHUNK_TOKENS = 1024
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossWeights:
    """loss = kl * KL(teacher || student) at temperature 1 + ce * cross entropy with the text;
    without a teacher the second alone."""

    kl: float = 1.0
    ce: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "loss weight ")
        if not (self.kl >= 0 and self.ce >= 0 and self.kl + self.ce > 0):
            raise LlmqError(
                f"loss weights kl {self.kl}, ce {self.ce}: expected two numbers of at least 0, one "
                "of them above it; give --kl or --ce"
            )


def _chunk_sums(
    hidden: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    head: Head,
    teacher_head: Head | None,
) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of a chunk of KL and cross entropy, float32. hidden `[C, D]`, targets
    `[C]`."""
    log_q = torch.log_softmax(head(hidden).float(), dim=-1)  # [C, V]
    ce = torch.nn.functional.nll_loss(log_q, targets, reduction="sum")
    if teacher_hidden is None or teacher_head is None:
        return ce.new_zeros(()), ce
    with torch.no_grad():
        log_p = torch.log_softmax(teacher_head(teacher_hidden).float(), dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True), ce


def distillation_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    weights: LossWeights,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, Tensor]:
    """Mean losses per counted token: "loss" and its parts "kl" and "ce" (detached).

    hidden: student's last hidden states `[B, T, D]`. targets: the token that follows each position,
    int64 `[B, T]`, -100 where none counts (padding, the last position). head: hidden states to
    logits."""
    counted = targets.reshape(-1) != -100
    rows = hidden.reshape(-1, hidden.shape[-1])[counted]
    goals = targets.reshape(-1)[counted]
    teacher_rows = (
        None
        if teacher_hidden is None
        else teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[counted]
    )
    kl = ce = rows.new_zeros((), dtype=torch.float32)
    for start in range(0, len(goals), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        chunk = (
            rows[part],
            goals[part],
            None if teacher_rows is None else teacher_rows[part],
            head,
            teacher_head,
        )
        chunk_kl, chunk_ce = (
            checkpoint(_chunk_sums, *chunk, use_reentrant=False)
            if torch.is_grad_enabled()
            else _chunk_sums(*chunk)
        )
        kl, ce = kl + chunk_kl, ce + chunk_ce
    n = max(1, len(goals))
    kl, ce = kl / n, ce / n
    total = weights.kl * kl + weights.ce * ce
    return {"loss": total, "kl": kl.detach(), "ce": ce.detach()}
