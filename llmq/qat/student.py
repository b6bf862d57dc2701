"""The module that is trained: a causal LM that returns its distillation loss instead of logits.

It is one module with one forward so that wrappers for data parallelism and gradient scaling see an
ordinary training step. The teacher hangs beside it, not inside: its weights are neither trained,
moved by `state_dict` nor broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmq.errors import LlmqError
from llmq.evaluation.perplexity import evaluate
from llmq.models.compat import BaseModelOutputWithPast
from llmq.qat.losses import Head, LossWeights, distillation_loss
from llmq.text.windows import Windows


def base_of(model: PreTrainedModel) -> nn.Module:
    """What gives the hidden states that enter the output head. Llama 4 calls its base by another
    name than it has, and then transformers takes the model itself for it: the module that the
    embeddings lie in is meant. Raises `LlmqError` where there is none but the model."""
    if model.base_model is not model:
        return model.base_model
    embeddings = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings]
    base = model.get_submodule(names[0].rpartition(".")[0]) if names else model
    if base is model:
        raise LlmqError(
            f"{type(model).__name__}: has no base model of its own, which the loss in chunks "
            "needs; llmq quantize works for it"
        )
    return base


def last_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The hidden states `[B, T, D]` that enter the output head."""
    hidden: Tensor = base_of(model)(input_ids=input_ids, use_cache=False)[0]
    return hidden


class _Given(BaseModelOutputWithPast):  # type: ignore[misc]  # of transformers, untyped
    """Hidden states in the place of what a base model returns; whatever else it may return is
    absent."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head_of(model: PreTrainedModel) -> Head:
    """Hidden states `[C, D]` or `[B, T, D]` to logits, as the model itself goes on from them: its
    own forward pass runs on a base model that only hands them over. Families differ in what lies
    there: soft caps, scales of the logits (Granite, Cohere) or of the hidden states."""
    # OPT calls the decoder inside its base model.
    candidates = dict.fromkeys([base_of(model), model.get_decoder()])
    bases = [base for base in candidates if base is not None and base is not model]

    def head(hidden: Tensor) -> Tensor:
        rows = hidden[None] if hidden.dim() == 2 else hidden

        def handed_over(*args: Any, **kwargs: Any) -> _Given:
            return _Given(last_hidden_state=rows)

        for base in bases:
            base.forward = handed_over
        try:
            logits: Tensor = model(input_ids=None, use_cache=False).logits
        finally:
            for base in bases:
                del base.forward
        return logits[0] if hidden.dim() == 2 else logits

    return Head(head, _outside_of(model, bases))


def _outside_of(model: PreTrainedModel, bases: Sequence[nn.Module]) -> tuple[nn.Parameter, ...]:
    """The parameters that a head may multiply with: all that lie in none of the bases, and the
    output embeddings, which may be those of the input."""
    inside = {id(each) for base in bases for each in base.parameters()}
    embeddings = model.get_output_embeddings()
    own = [] if embeddings is None else list(embeddings.parameters())
    outside = [each for each in model.parameters() if id(each) not in inside]
    return tuple({id(each): each for each in (*own, *outside)}.values())


def check_student(model: PreTrainedModel) -> None:
    """Raise `LlmqError`, before anything is computed, for a model on the meta device whose forward
    pass cannot be taken apart into hidden states and head."""
    base_of(model)
    if model.get_output_embeddings() is None:
        raise LlmqError(
            f"{type(model).__name__}: has no output head of its own, which the loss in chunks "
            "needs; llmq quantize works for it"
        )


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
            f"{type(model).__name__}: its logits do not follow from its last hidden states alone, "
            "so the loss in chunks does not fit it; llmq quantize works for it"
        )


def check_same_vocabulary(config: PretrainedConfig, teacher_config: PretrainedConfig) -> None:
    """Raise `LlmqError` for a teacher whose logits stand for other tokens."""
    ours, theirs = (each.get_text_config().vocab_size for each in (config, teacher_config))
    if ours != theirs:
        raise LlmqError(
            f"the teacher has a vocabulary of {theirs}, the student one of {ours}; distillation "
            "needs the same tokenizer, so take a teacher of the same family"
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
        self.teachers: list[PreTrainedModel] = (  # in a list, or it would be a part of this module
            [] if teacher is None else [teacher.eval().requires_grad_(False)]
        )
        check_head(model)
        if teacher is not None:
            check_head(teacher)
            check_same_vocabulary(model.config, teacher.config)

    def forward(self, input_ids: Tensor) -> dict[str, Any]:
        """loss and its parts for tokens int64 `[B, T]`."""
        teacher_hidden = teacher_head = None
        for teacher in self.teachers:
            with torch.no_grad():
                teacher_hidden, teacher_head = last_hidden(teacher, input_ids), head_of(teacher)
        return distillation_loss(
            last_hidden(self.model, input_ids),
            next_tokens(input_ids),
            head_of(self.model),
            self.weights,
            teacher_hidden,
            teacher_head,
        )

    def perplexity(self, windows: Windows) -> float:
        """Of the model in training, with what its quantizers are switched to."""
        return evaluate(self.model, windows).value
