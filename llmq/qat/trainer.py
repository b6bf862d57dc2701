"""transformers' Trainer with the few things that quantization-aware training adds: its schedule,
its learning rates, its telemetry and checkpoints of exact float32 masters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmq.errors import LlmqError, VerificationError
from llmq.models.compat import get_available_reporting_integrations
from llmq.qat import shards
from llmq.qat.callback import QATCallback
from llmq.qat.rates import SCALES, parameter_groups
from llmq.qat.settings import QATSettings
from llmq.qat.student import Student
from llmq.qat.telemetry import Telemetry
from llmq.qat.weights import fake_quant_modules
from llmq.storage import files, seals
from llmq.storage.workspace import tell
from llmq.text.windows import Windows

WEIGHTS = "masters.safetensors"
LOG = "log.jsonl"
SEAL = "llmq-seal.json"
BETA2 = 0.95  # of Adam's second moment: runs are short


def training_arguments(
    settings: QATSettings, n_steps: int, out_dir: Path, *, device: str, report_to: str = "none"
) -> TrainingArguments:
    """The Trainer's own arguments."""
    log_every, save_every = settings.cadence(n_steps)
    arguments = TrainingArguments(
        output_dir=str(out_dir),
        max_steps=n_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=device == "cpu",
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        adam_beta2=BETA2,
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        report_to=report_to,
        remove_unused_columns=False,
        label_names=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
    )
    # One GPU per process: with more in sight the Trainer would split batches over threads
    # (DataParallel), whose copies of the student all have the teacher on the first GPU.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def check_reporter(name: str) -> None:
    """Raise `LlmqError` for a reporter that the Trainer does not know or that is not installed."""
    installed = get_available_reporting_integrations()
    if name not in ("none", *installed):
        raise LlmqError(
            f"--report-to {name}: expected none{''.join(f' or {each}' for each in installed)}, "
            "which are the ones installed here"
        )


def remedy(args: TrainingArguments) -> str:
    """What to do about numbers that are not finite."""
    last = last_checkpoint(Path(args.output_dir))
    return (
        f"{f'the last good checkpoint is {last}' if last else 'there is no checkpoint yet'}; "
        "give a lower --lr-weights or use --precision fp32"
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is as it was then."""
    newest_first = sorted(_checkpoints(folder), key=step_of, reverse=True)
    sound = (path for path in newest_first if seals.folder_is_sound(path, SEAL))
    return next(sound, None)


def drop_unsound(folder: Path) -> None:
    """Remove the checkpoints that cannot be continued from."""
    for path in _checkpoints(folder):
        if not seals.folder_is_sound(path, SEAL):
            if os.path.lexists(path / SEAL):
                tell(
                    f"{path}: is not as it was when it was finished; training goes on from the "
                    "checkpoint before"
                )
            files.remove(path)


def restore_log(checkpoint: Path | None, log_path: Path) -> None:
    """Put the log back as it was at a checkpoint: the steps after it are taken again, and what a
    crash left of their rows may be torn."""
    kept = None if checkpoint is None else checkpoint / LOG
    if kept is not None and kept.is_file():
        files.write_bytes(log_path, kept.read_bytes())
    else:
        files.remove(log_path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


class ScheduleCallback(QATCallback):
    """Keeps the log of a run, and scores the held-out windows with the hard quantizer."""

    def __init__(
        self, student: Student, settings: QATSettings, held_out: Windows | None, log_path: Path
    ) -> None:
        super().__init__(settings.phases)
        self.student, self.settings, self.held_out, self.log_path = (
            student,
            settings,
            held_out,
            log_path,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Flips are counted by the trainer, from where it resumes."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        every = self.settings.eval_every or max(1, state.max_steps // 5)
        is_due = state.global_step % every == 0 or state.global_step == state.max_steps
        takes_part = state.is_world_process_zero or shards.is_sharded(self.student)
        if self.held_out is None or not (is_due and takes_part):
            return
        found = held_out_perplexity(self.student, self.held_out)
        if state.is_world_process_zero:
            self._write({"step": state.global_step, "held_out_perplexity": found})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._write(
                {"step": state.global_step, **{name: float(value) for name, value in logs.items()}}
            )

    def remedy(self, args: TrainingArguments) -> str:
        return remedy(args)

    def _write(self, row: dict[str, Any]) -> None:
        files.append(self.log_path, json.dumps(row) + "\n")


def held_out_perplexity(student: Student, windows: Windows) -> float:
    """Perplexity with everything quantized that will be, whatever the schedule is at; it sets its
    switches again before the next step."""
    training = student.training
    for module in fake_quant_modules(student).values():
        module.strength = 1.0
        if module.activations is not None:
            module.activations.enabled = True
    student.eval()
    try:
        return student.perplexity(windows)
    finally:
        student.train(training)


class QATTrainer(Trainer):
    """settings: see `QATSettings`. log_path: the log that checkpoints keep a copy of. The rest as
    in `transformers.Trainer`; the model is a `Student`."""

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(
        self, *, settings: QATSettings, log_path: Path | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.log_path = log_path
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to the result
        self.settings = settings
        self.telemetry = Telemetry()
        self.parts: dict[str, Tensor] = {}
        self.n_parts = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the Trainer's arguments, with the groups of `parameter_groups`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(
                self.model,
                self.args.max_steps,
                lr_weights=self.settings.lr_weights,
                lr_scales=self.settings.lr_scales,
            )
            self.optimizer = kind(groups, **{**options, "weight_decay": 0.0})
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        if self.lr_scheduler is None:
            assert self.optimizer is not None
            self.lr_scheduler = LambdaLR(
                self.optimizer,
                [
                    self._factor(num_training_steps, group["kind"])
                    for group in self.optimizer.param_groups
                ],
            )
        return self.lr_scheduler

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """A split model brings its gradients together itself."""
        if shards.is_sharded(model):
            return _AsItIs(model, self.accelerator)
        wrapped: nn.Module = super()._wrap_model(model, *args, **kwargs)
        return wrapped

    def _factor(self, n_steps: int, kind: str) -> Callable[[int], float]:
        return lambda step: self.settings.phases.learning_rate(
            step / n_steps, scales=kind == SCALES
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not bool(torch.isfinite(loss.detach())):
            raise VerificationError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; {remedy(self.args)}"
            )
        self.parts = {name: self.parts.get(name, 0) + outputs[name] for name in ("kl", "ce")}
        self.n_parts += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.n_parts:
            means = self.accelerator.reduce(
                torch.stack(list(self.parts.values())) / self.n_parts, reduction="mean"
            ).tolist()
            logs = {
                **logs,
                **dict(zip(self.parts, means, strict=True)),
                **self.telemetry(self.model),
            }
            self.parts, self.n_parts = {}, 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if shards.is_sharded(self.model):
            return  # all processes write what they have, when the others' parts are there
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / WEIGHTS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, make durable, seal: a checkpoint counts from its seal on. The one before is there
        until then, since two are kept."""
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if shards.is_sharded(self.model):
            self.accelerator.wait_for_everyone()  # the folder is the first process's
            shards.save_all(self.model, self._bare_optimizer(), folder)
        self.accelerator.wait_for_everyone()  # each process writes the state of its generators
        if not self.args.should_save:
            return
        if self.log_path is not None and self.log_path.is_file():
            files.write_bytes(folder / LOG, self.log_path.read_bytes())
        files.sync_folder(folder.parent.parent)
        seals.seal_folder(folder, SEAL)

    def load_checkpoint(self, folder: Path) -> None:
        """Take the weights of a checkpoint, without training on."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if shards.is_sharded(self.model):
            shards.load_model(self.model, folder)
        else:
            load_model(self.model if model is None else model, str(folder / WEIGHTS))
        self.telemetry(
            self.model
            # checkpoints are where the log has rows, so these are the codes that the next row
            # counts flips from
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not shards.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The schedule of a split run follows from its step."""
        if checkpoint is None or not shards.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        shards.load_optimizer(self.model, self._bare_optimizer(), Path(checkpoint))
        assert self.lr_scheduler is not None
        self.lr_scheduler.step(self.state.global_step)

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what accelerate puts around it."""
        assert self.optimizer is not None
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return bare


class _AsItIs(nn.Module):
    """A split student in the place of what the Trainer would put around a model: nothing but the
    arithmetic of the run."""

    def __init__(self, student: nn.Module, accelerator: Any) -> None:
        super().__init__()
        self.student, self.accelerator = student, accelerator

    def forward(self, **inputs: Tensor) -> Any:
        with self.accelerator.autocast():
            return self.student(**inputs)
