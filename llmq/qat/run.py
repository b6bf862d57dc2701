"""Fine-tune a folder into a folder: PTQ start, training, freezing, and the choice of the better one.

    .OUT.qat/           everything of an unfinished run, kept until OUT is there
      settings.json     what the run is; a second one with other settings is refused
      start/            the PTQ result that training starts from (and falls back to)
      trainer/          the Trainer's checkpoints
      log.jsonl         loss and telemetry

The same command continues an interrupted run wherever it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmq import data
from llmq.errors import LlmqError
from llmq.evaluation.perplexity import Perplexity, evaluate
from llmq.evaluation.windows import Windows, identified
from llmq.formats import files
from llmq.formats.load import load
from llmq.formats.save import save
from llmq.kv import quantize_kv
from llmq.models.arch import find_blocks, quantizable_layers
from llmq.models.load import load_config, load_tokenizer, meta_model, resolve
from llmq.modules import quantized_modules
from llmq.ptq.report import versions
from llmq.ptq.run import prepare as prepare_ptq
from llmq.ptq.run import quantize_folder
from llmq.qat.data import TokenWindows, split_windows
from llmq.qat.generate import generate_windows
from llmq.qat.losses import CHUNK_TOKENS
from llmq.qat.settings import QATSettings
from llmq.qat.student import Student, check_same_vocabulary
from llmq.qat.trainer import QATTrainer, ScheduleCallback, last_checkpoint, training_arguments
from llmq.qat.weights import freeze, prepare
from llmq.recipe import LayerPlan, Recipe, Rule
from llmq.spec import ActSpec

GENERATED = "generated"
Show = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class QATJob:
    """Everything known before anything is trained. windows: int64 `[n, T]`, or None while they are still to be generated. held_out: windows of the same text, or None where there are none."""

    model_dir: Path
    teacher_dir: Path
    settings: QATSettings
    recipe: Recipe
    train: str
    windows: Tensor | None
    held_out: Windows | None
    n_parameters: int
    plans: list[LayerPlan]
    device: str

    @property
    def notes(self) -> dict[str, str]:
        """Layers that differ from what was asked."""
        return {plan.layer.name: plan.note for plan in self.plans if plan.note}

    @property
    def teacher_dtype(self) -> str:
        """What the teacher is held and computed in: bfloat16 if it is stored so and the arithmetic of the run is bfloat16 anyway, else float32."""
        return "bfloat16" if self.settings.precision == "bf16" and load_config(self.teacher_dir).dtype == torch.bfloat16 else "float32"

    @property
    def processes(self) -> PartialState:
        """The processes that train together, under `accelerate launch` or `torchrun`; one otherwise."""
        return processes(self.device)

    @property
    def n_windows(self) -> int:
        """Windows that are trained on once."""
        if self.windows is not None:
            return len(self.windows)
        if self.settings.max_tokens:
            return -(-int(self.settings.max_tokens) // self.settings.sequence_length)
        return (self.settings.max_steps or 0) * self.settings.windows_per_step(self.processes.num_processes)

    def identity(self) -> dict[str, Any]:
        """What decides the result: a started run is continued only with all of it the same."""
        return {
            "model": str(self.model_dir), "teacher": str(self.teacher_dir), "train": self.train, "windows": None if self.windows is None else data.token_hash(self.windows),
            "recipe": self.recipe.to_json(), "processes": self.processes.num_processes, **self.settings.to_json(),
        }  # fmt: skip

    def budget(self) -> dict[str, Any]:
        """tokens, steps, peak memory in bytes of weights and optimizer and of activations, and floating-point operations of the training. Estimates."""
        n_processes = self.processes.num_processes
        steps = self.settings.n_steps(self.n_windows, n_processes)
        tokens = steps * self.settings.windows_per_step(n_processes) * self.settings.sequence_length
        # float32 masters, gradients and two moments, and the teacher. Student forward and backward, teacher forward, heads once more in the backward pass.
        n_bytes = self.n_parameters * (4 * 4 + (2 if self.teacher_dtype == "bfloat16" else 4))
        # Kept for the backward pass: each layer's input and output, and as much again around attention and norms; with checkpointing, of one block. And one chunk of float32 logits three times.
        per_token = 2 * sum(sum(plan.layer.shape) for plan in self.plans) * (4 if self.settings.precision == "fp32" else 2)
        config = load_config(self.model_dir).get_text_config()
        kept = self.settings.tokens_per_batch * per_token // (config.num_hidden_layers if self.settings.gradient_checkpointing else 1)
        logits = 3 * 4 * CHUNK_TOKENS * config.vocab_size
        return {"tokens": tokens, "steps": steps, "bytes": n_bytes, "activation_bytes": kept + logits, "flops": 8.5 * self.n_parameters * tokens}


def prepare_job(
    model: str,
    settings: QATSettings,
    *,
    train: str = data.BUNDLED,
    teacher: str | None = None,
    rules: tuple[Rule, ...] = (),
    revision: str | None = None,
    device: str = "cpu",
) -> QATJob:
    """Resolve and check everything that can be checked before computing. Raises `LlmqError`."""
    check_engine()
    model_dir = resolve(model, revision)
    config = load_config(model_dir)
    if getattr(config, "quantization_config", None) is not None:
        raise LlmqError(f"{model_dir}: is quantized already; start from the full-precision model")
    skeleton = meta_model(config)
    n_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    activations = ActSpec(settings.scheme.activations, settings.scheme.kv_bits, settings.kv_before_rope)  # type: ignore[arg-type]
    recipe = Recipe(rules=(*rules, Rule("*", settings.scheme.weights)), method=settings.init, sequence_length=settings.sequence_length, seed=settings.seed, activations=activations)
    plans = recipe.plan(quantizable_layers(skeleton))
    if train == GENERATED and settings.max_tokens is None and settings.max_steps is None:
        raise LlmqError("--train generated: give --max-tokens or --max-steps, since generated text has no end")
    if settings.precision == "fp16" and device == "cpu":
        raise LlmqError("--precision fp16 needs a GPU: CPUs have no fast float16 training; use bf16 or fp32")
    teacher_dir = resolve(teacher, None) if teacher else model_dir
    check_same_vocabulary(config, load_config(teacher_dir))
    if teacher and load_tokenizer(teacher_dir).get_vocab() != load_tokenizer(model_dir).get_vocab():
        raise LlmqError(f"{teacher_dir}: the teacher's tokenizer has other tokens than that of {model_dir}; distillation needs the same tokenizer, so take a teacher of the same family")
    windows, held_out = None, None
    if train != GENERATED:
        windows, held_out = _read_text(model_dir, config, settings, train, processes(device).num_processes)
    job = QATJob(model_dir, teacher_dir, settings, recipe, train, windows, held_out, n_parameters, plans, device)
    per_step = settings.windows_per_step(job.processes.num_processes)
    if job.n_windows < per_step:
        raise LlmqError(f"--max-tokens {settings.max_tokens}: makes {job.n_windows} windows of {settings.sequence_length}, but one step needs {per_step}; give more, or a smaller --batch-size")
    return job


def processes(device: str) -> PartialState:
    """The processes that train together. They wait for the first one's PTQ start, which takes longer than the half hour that torch waits by itself."""
    return PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))


def check_engine() -> None:
    """Raise `LlmqError` where accelerate was configured to split weights: scales and telemetry belong to whole rows, which processes of FSDP and DeepSpeed do not have."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise LlmqError(f"llmq qat trains with whole weights in every process, not with {name}; use data parallelism: accelerate launch --multi_gpu -m llmq qat ...")


def _read_text(model_dir: Path, config: Any, settings: QATSettings, train: str, n_processes: int) -> tuple[Tensor, Windows | None]:
    documents, tokenizer = data.load_documents(train, "train"), load_tokenizer(model_dir)
    row = data.tokenize(documents, tokenizer)
    data.check_vocabulary(row, config.get_text_config().vocab_size, train)
    windows, held_out = split_windows(row, settings.sequence_length, settings.n_held_out, settings.windows_per_step(n_processes), train)
    return windows, identified(held_out, "none", documents, tokenizer) if len(held_out) else None


def work_dir_of(out_dir: Path) -> Path:
    """Beside the output; where that is a link, beside what it points to, so that a rename can publish it."""
    out_dir = out_dir.resolve()
    return out_dir.with_name(f".{out_dir.name}.qat")


def check_identity(work_dir: Path, identity: dict[str, Any]) -> None:
    """Start a run, or continue it. Raises `LlmqError` that names what differs from the run that was started."""
    path = work_dir / "settings.json"
    identity = json.loads(json.dumps(identity))
    if path.exists():
        started = json.loads(path.read_text())
        different = [name for name in identity if identity[name] != started.get(name)]
        if different:
            name = different[0]
            raise LlmqError(
                f"{work_dir}: holds a run with other settings ({', '.join(different)}: {started.get(name)!r} there, {identity[name]!r} now); give the same ones to continue it, or remove the folder"
            )
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    files.write_json(path, identity)


def fine_tune(job: QATJob, out_dir: Path, *, overwrite: bool = False, report_to: str = "none", show: Show = lambda title, done, total, remark: None) -> dict[str, Any]:
    """Run a job into a folder and return its report. Continues an interrupted run of the same job.

    show: told of progress (title, done, total, remark). report_to: what the Trainer reports to, "none", "tensorboard" or "wandb". Raises `LlmqError` for bad input, `VerificationError` for a
    loss that is not finite.
    """
    state, device = job.processes, job.device
    started = time.monotonic()
    work_dir = work_dir_of(out_dir)
    if state.is_main_process:
        files.check_output(out_dir, overwrite)
        check_identity(work_dir, job.identity())
    state.wait_for_everyone()
    with state.main_process_first():
        job = _with_text(job, work_dir, device, show)
        start_dir = _start(job, work_dir, device, show)
    model = student_model(job, start_dir)
    assert job.windows is not None
    train(model, job, job.windows, work_dir, report_to=report_to, show=show)
    report: dict[str, Any] = {}
    if state.is_main_process:
        report = _ship(model.to("cpu"), job, start_dir, work_dir, out_dir, overwrite, time.monotonic() - started)
        shutil.rmtree(work_dir)
    state.wait_for_everyone()
    return report


def _start(job: QATJob, work_dir: Path, device: str, show: Show) -> Path:
    """The PTQ result, made once."""
    start_dir = work_dir / "start"
    if not start_dir.exists():
        assert job.windows is not None
        # No other text than the generated one is looked at: that is what the mode is for.
        source = job.train if job.train != GENERATED else data.TokenSet(job.windows[: job.recipe.samples], GENERATED)
        ptq = prepare_ptq(str(job.model_dir), job.recipe, calibration=source)
        total, done = len(find_blocks(ptq.model)[1]), 0

        def on_block(report: Any) -> None:
            nonlocal done
            done += 1
            show(f"{job.recipe.method} start", done, total, f"{report.seconds:.1f} s/block")

        quantize_folder(ptq, start_dir, device=device, on_block=on_block)
    return start_dir


def _with_text(job: QATJob, work_dir: Path, device: str, show: Show) -> QATJob:
    """The job with its windows, which are written by the teacher where there is no other text; a few more than are trained on decide whether training helped."""
    if job.windows is not None:
        return job
    teacher = load(job.teacher_dir, dtype="float32").to(device)
    n_held_out = min(job.settings.n_held_out, -(-job.n_windows // 9))
    n = job.n_windows + n_held_out
    tokens = generate_windows(teacher, n, job.settings.sequence_length, work_dir, seed=job.settings.seed, on_batch=lambda done, total: show("generated", done, total, ""))
    windows, held_out = tokens[: job.n_windows], tokens[job.n_windows :]
    identity = [data.token_hash(tokens)]  # there is no text beside the tokens
    return replace(job, windows=windows, held_out=identified(held_out, "none", identity, load_tokenizer(job.model_dir)) if len(held_out) else None)


def student_model(job: QATJob, start_dir: Path) -> PreTrainedModel:
    """The model in float32 with its quantized layers in training, starting from the PTQ result."""
    settings = job.settings
    start = {name: module.qtensor() for name, module in quantized_modules(load(start_dir, dtype="float32")).items()}
    model = load(job.model_dir, dtype="float32")
    prepare(model, start, settings.quantizer, settings.scheme.activations)
    quantize_kv(model, settings.scheme.kv_bits, before_rope=settings.kv_before_rope)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


class _Progress(TrainerCallback):
    def __init__(self, show: Show) -> None:
        self.show = show

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.show("training", state.global_step, state.max_steps, f"loss {float(logs['loss']):.4f}")


def train(model: PreTrainedModel, job: QATJob, windows: Tensor, work_dir: Path, *, report_to: str = "none", show: Show = lambda title, done, total, remark: None) -> None:
    """Train in place, from the last checkpoint in `work_dir` where there is one."""
    settings = job.settings
    n_steps = settings.n_steps(len(windows), job.processes.num_processes)
    trainer_dir = work_dir / "trainer"
    teacher = load(job.teacher_dir, dtype=job.teacher_dtype).to(job.processes.device) if settings.loss.kl else None
    student = Student(model, teacher, settings.loss)
    callbacks = [ScheduleCallback(student, settings, job.held_out, work_dir / "log.jsonl"), _Progress(show)]
    arguments = training_arguments(settings, n_steps, trainer_dir, device=job.device, report_to=report_to)
    trainer = QATTrainer(settings=settings, model=student, args=arguments, train_dataset=TokenWindows(windows), callbacks=callbacks)
    last = last_checkpoint(trainer_dir)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    settings.phases.apply(student, 1.0)
    model.eval()


def _ship(model: PreTrainedModel, job: QATJob, start_dir: Path, work_dir: Path, out_dir: Path, overwrite: bool, seconds: float) -> dict[str, Any]:
    """Freeze, compare with the start on held-out text, and publish the better one."""
    freeze(model, job.recipe.activations)
    staging = work_dir / "out"
    shutil.rmtree(staging, ignore_errors=True)
    save(_in_source_dtype(model, job.model_dir), staging, tokenizer=load_tokenizer(job.model_dir))
    scores: dict[str, Perplexity] = {}
    if job.held_out is not None:  # of what is on the disk: embeddings and norms are rounded to the source's dtype there
        folders = {"full_precision": job.model_dir, "start": start_dir, "trained": staging}
        scores = {name: evaluate(load(folder, dtype="float32"), job.held_out) for name, folder in folders.items()}
    improved = not scores or scores["trained"].value < scores["start"].value
    if not improved:
        shutil.rmtree(staging)
        shutil.copytree(start_dir, staging)
    log = work_dir / "log.jsonl"
    report = _report(job, scores, improved, log, seconds)
    if log.exists():
        shutil.copyfile(log, staging / "log.jsonl")
    files.write_json(staging / "report.json", report)
    if (work_dir / "trainer" / "runs").is_dir():
        shutil.copytree(work_dir / "trainer" / "runs", staging / "runs")  # TensorBoard's
    (staging / files.MANIFEST).unlink()
    files.write_manifest(staging)
    files.publish(staging, out_dir)
    return report


def _in_source_dtype(model: PreTrainedModel, model_dir: Path) -> PreTrainedModel:
    """Embeddings, norms and biases go back to the dtype that the source stores; packed weights and scales stay as they are."""
    dtype = load_config(model_dir).dtype or torch.float32
    model.config.dtype = dtype
    return model.to(dtype)


def _report(job: QATJob, scores: dict[str, Perplexity], improved: bool, log: Path, seconds: float) -> dict[str, Any]:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "model": job.model_dir.name,
        "teacher": job.teacher_dir.name,
        "teacher_dtype": job.teacher_dtype,
        "method": "qat",
        "shipped": "trained" if improved else "start",
        "verdict": None if scores else "no held-out text (fewer than 10 windows): nothing was compared",
        "settings": job.settings.to_json(),
        "activations": asdict(job.recipe.activations),
        "train": {"source": job.train, "windows": list(job.windows.shape) if job.windows is not None else job.n_windows},
        "budget": job.budget(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out": {name: score.to_json() for name, score in scores.items()},
        "layers": [{"name": plan.layer.name, "spec": None if plan.spec is None else str(plan.spec)} for plan in job.plans],
        "notes": job.notes,
        "seconds": round(seconds, 2),
        "versions": versions(),
    }
