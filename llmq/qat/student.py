"""The module that is trained: a causal LM that returns its distillation loss instead of logits.

It is one module with one forward so that wrappers for data parallelism and gradient scaling see an
ordinary training step. The teacher hangs beside it, not inside: its weights are neither trained,
moved by `state_dict` nor broadcast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.qat.activations import ActivationQuantizer
from llmq.qat.losses import Head, LossWeights, distillation_loss


def last_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The hidden states `[B, T, D]` that enter the output head."""
    return model.base_model(input_ids=input_ids, use_cache=False)[0]


def head_of(model: PreTrainedModel) -> Head:
    """Hidden states to logits, with the soft cap of the families that have one."""
    linear, cap = (
        model.get_output_embeddings(),
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    )
    return linear if cap is None else lambda hidden: torch.tanh(linear(hidden) / cap) * cap


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise `LlmqError` for a model whose logits are more than the head on the last hidden states:
    its loss would be another one."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()  # or static ranges of activations would start from these four tokens
    expected, found = (
        model(input_ids=ids, use_cache=False).logits.float(),
        head_of(model)(last_hidden(model, ids)).float(),
    )
    model.train(training)
    if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise LlmqError(
            f"{type(model).__name__}: its logits are not its output head applied to its last hidden states, so the loss in chunks does not fit it; please report the model"
        )


def check_same_vocabulary(config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
    """Raise `LlmqError` for a teacher whose logits stand for other tokens."""
    ours, theirs = (each.get_text_config().vocab_size for each in (config, teacher_config))
    if ours != theirs:
        raise LlmqError(
            f"the teacher has a vocabulary of {theirs}, the student one of {ours}; distillation needs the same tokenizer, so take a teacher of the same family"
        )


def next_tokens(input_ids: Tensor) -> Tensor:
    """Targets `[B, T]`: the token after each position, -100 at the end."""
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)


class Student(nn.Module):
    """model: in training. teacher: full precision, on the device that is trained on, or None to
    train on the text alone."""

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, weights: LossWeights
    ) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self._beside: list[PreTrainedModel] = (
            [] if teacher is None else [teacher.eval().requires_grad_(False)]
        )
        self._nodes = [
            module for module in model.modules() if isinstance(module, ActivationQuantizer)
        ]
        check_head(model)
        if teacher is not None:
            check_head(teacher)
            check_same_vocabulary(model.config, teacher.config)

    def forward(self, input_ids: Tensor) -> dict[str, Any]:
        """loss and its parts for tokens int64 `[B, T]`."""
        teacher_hidden = teacher_head = None
        for teacher in self._beside:
            with torch.no_grad():
                teacher_hidden, teacher_head = last_hidden(teacher, input_ids), head_of(teacher)
        for node in self._nodes:
            node.recomputing = False
        hidden = last_hidden(self.model, input_ids)
        for node in self._nodes:  # whatever runs from here on is gradient checkpointing
            node.recomputing = True
        return distillation_loss(
            hidden,
            next_tokens(input_ids),
            head_of(self.model),
            self.weights,
            teacher_hidden,
            teacher_head,
        )
