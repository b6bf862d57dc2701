"""Quantization-aware training inside transformers' Trainer, and in those that are made from it.

llmq.prepare_qat(model, "w4g64", texts, tokenizer=tokenizer)
optimizer = torch.optim.AdamW(llmq.qat_parameter_groups(model))
trainer = Trainer(model, args, train_dataset=data, callbacks=[llmq.QATCallback()],
                  optimizers=(optimizer, None))  # or TRL's SFTTrainer
trainer.train()
llmq.freeze(model)
llmq.save(model, "out", tokenizer=tokenizer)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmq.errors import LlmqError, VerificationError
from llmq.models.compat import get_last_checkpoint
from llmq.qat.schedule import Phases
from llmq.qat.telemetry import Telemetry
from llmq.qat.weights import fake_quant_modules, whole

SKIPPED_STEPS = 40  # in a row under fp16: its scaler starts at 2^16 and is below 2^-24 by then


class QATCallback(TrainerCallback):
    """Sets the switches of the quantizers before every step, counts code flips, zeros and clipped
    weights into the log, and ends a run whose gradient is not finite.

    phases: what changes when; learning rates are the Trainer's own. Raises `LlmqError` at the
    beginning of a training of a model that was not prepared, or whose scales would decay."""

    def __init__(self, phases: Phases = Phases()) -> None:
        self.phases = phases
        self.telemetry = Telemetry()
        self.n_skipped = 0  # steps in a row

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        if not fake_quant_modules(model):
            raise LlmqError(
                f"QATCallback: {type(model).__name__} has no layer in training through a "
                "quantizer; call llmq.prepare_qat(model, recipe, texts) before the Trainer is made"
            )
        check_decay(model, kwargs["optimizer"].param_groups)
        self.telemetry(model)  # the codes that the first row counts flips from

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.phases.apply(kwargs["model"], state.global_step / state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """A finite loss can have a gradient that is not, and one such step is in every weight. The
        scaler of fp16 skips these steps and halves its factor, which must help at some time."""
        parameters = kwargs["model"].parameters()
        gradients = [each.grad for each in parameters if each.grad is not None]
        is_finite = bool(torch.isfinite(whole(nn.utils.get_total_norm(gradients))))
        self.n_skipped = 0 if is_finite else self.n_skipped + 1
        if self.n_skipped >= (min(SKIPPED_STEPS, state.max_steps) if args.fp16 else 1):
            raise VerificationError(
                f"step {state.global_step + 1}: the gradient holds NaN or infinite values; "
                f"{self.remedy(args)}"
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Scales stop where they are kept, which of a split model a forward pass does not reach."""
        for module in fake_quant_modules(kwargs["model"]).values():
            module.quantizer.keep_positive()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        found = self.telemetry(kwargs["model"])
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.phases.apply(kwargs["model"], 1.0)

    def remedy(self, args: TrainingArguments) -> str:
        """What to do about numbers that are not finite."""
        folder = Path(args.output_dir)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return (
            f"{f'the last checkpoint is {last}' if last else 'there is no checkpoint yet'}; "
            "give a lower learning rate or train in fp32"
        )


def check_decay(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Raise `LlmqError` where an optimizer lets scales or zero points decay."""
    quantizers = {
        id(parameter): f"{name}.quantizer"
        for name, module in fake_quant_modules(model).items()
        for parameter in module.quantizer.parameters()
    }
    for group in groups:
        decay = group.get("weight_decay", 0.0)
        decaying = [quantizers[id(each)] for each in group["params"] if id(each) in quantizers]
        if decay and decaying:
            raise LlmqError(
                f"{decaying[0]}: scales and zero points would decay by {decay}, which shrinks what "
                "their codes stand for; give optimizers=(torch.optim.AdamW("
                "llmq.qat_parameter_groups(model)), None), or weight_decay=0"
            )
