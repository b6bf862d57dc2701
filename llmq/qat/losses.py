"""Distillation without the logits of a whole batch.

For 8 sequences of 2048 tokens and a vocabulary of 128k the float32 logits of one model take 8.4 GB,
and a plain loss keeps several copies of teacher's and student's. So the models stop at their last
hidden states, and the heads run on chunks of tokens. Each chunk's gradient, which is a difference
of likelihoods, is written down on the way forward, so its logits are neither kept nor computed
again. At no time do more than `CHUNK_TOKENS` rows exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.fields import check_fields

CHUNK_TOKENS = 512
COPIES = 5  # of the logits of a chunk, float32: of the student's and the teacher's


@dataclass(frozen=True)
class Head:
    """function: hidden states to logits. parameters: all that it multiplies with and that are
    trained; a gradient reaches no others."""

    function: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)


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
    int64 `[B, T]`, -100 where none counts (padding, the last position)."""
    counted = targets.reshape(-1) != -100
    rows = hidden.reshape(-1, hidden.shape[-1])[counted]
    aims = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher_rows = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[counted]
        aims = _Aims(teacher_rows, teacher_head)
    chunks = _Chunks(targets.reshape(-1)[counted], head, weights, aims, chunk_tokens)
    parameters = [each for each in head.parameters if each.requires_grad]
    is_trained = rows.requires_grad or bool(parameters)
    with_gradient = torch.is_grad_enabled() and is_trained
    loss, kl, ce = _Loss.apply(chunks, with_gradient, rows, *parameters)
    return {"loss": loss, "kl": kl, "ce": ce}


@dataclass(frozen=True)
class _Aims:
    """What the teacher says. rows: its last hidden states `[n, D]`."""

    rows: Tensor
    head: Head

    def likelihoods(self, part: slice) -> tuple[Tensor, Tensor]:
        """Their logarithms and they themselves, float32 `[C, V]`."""
        logits = self.head(self.rows[part]).float()
        return torch.log_softmax(logits, dim=-1), torch.softmax(logits, dim=-1)


@dataclass(frozen=True)
class _Chunks:
    """All that a loss is computed from but the student's rows. goals: int64 `[n]`."""

    goals: Tensor
    head: Head
    weights: LossWeights
    aims: _Aims | None
    chunk_tokens: int

    @property
    def parts(self) -> list[slice]:
        starts = range(0, len(self.goals), self.chunk_tokens)
        return [slice(start, start + self.chunk_tokens) for start in starts]

    @property
    def n_tokens(self) -> int:
        return max(1, len(self.goals))

    def sums(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over a chunk of KL and cross entropy, and the gradient of the weighted sum by its
        logits `[C, V]`, float32: of the divergence that is `q - p`, of cross entropy `q - 1` at
        the token that follows."""
        goals = self.goals[part, None]
        logits = logits.detach().float()
        log_q, gradient = torch.log_softmax(logits, dim=-1), torch.softmax(logits, dim=-1)
        ce, of_kl, of_ce = -log_q.gather(1, goals).sum(), 0.0, self.weights.ce
        kl = ce.new_zeros(())
        if self.aims is not None:
            of_kl = self.weights.kl
            log_p, p = self.aims.likelihoods(part)
            kl = log_p.sub_(log_q).mul_(p).sum()
            gradient.mul_(of_kl + of_ce).sub_(p, alpha=of_kl)
        else:
            gradient.mul_(of_ce)
        gradient.scatter_add_(1, goals, gradient.new_full((), -of_ce).expand_as(goals))
        return kl, ce, gradient


class _Loss(torch.autograd.Function):
    """Rows `[n, D]` and the parameters of the head to the loss and its parts. Gradients are those
    of the sums over tokens until the backward pass, so that float16 does not lose them."""

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, with_gradient: bool, rows: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl = ce = rows.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor | None] = [torch.zeros_like(rows), *(None for _ in parameters)]
        for part in chunks.parts:
            own = rows[part].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = chunks.head(own)
            chunk_kl, chunk_ce, gradient = chunks.sums(part, logits)
            kl, ce = kl + chunk_kl, ce + chunk_ce
            if with_gradient:
                found = torch.autograd.grad(
                    logits, [own, *parameters], gradient.to(logits.dtype), allow_unused=True
                )
                _add(gradients, part, found)
        ctx.gradients, ctx.n_tokens = gradients, chunks.n_tokens
        kl, ce = kl / chunks.n_tokens, ce / chunks.n_tokens
        ctx.mark_non_differentiable(kl, ce)
        return chunks.weights.kl * kl + chunks.weights.ce * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scale = factor / ctx.n_tokens
        return (None, None, *(None if each is None else each.mul_(scale) for each in gradients))


def _add(gradients: list[Tensor | None], part: slice, found: Sequence[Tensor | None]) -> None:
    """Put a chunk's gradients to the others: of its rows, and of the parameters of the head."""
    of_rows, *of_parameters = found
    if gradients[0] is not None and of_rows is not None:
        gradients[0][part] = of_rows
    for number, own in enumerate(of_parameters, 1):
        before = gradients[number]
        gradients[number] = own if before is None or own is None else before.add_(own)
