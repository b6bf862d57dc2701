"""Fine-tune a folder into a folder: PTQ start, training, freezing, and the choice of the better
one.

    .OUT.qat/           everything of an unfinished run, kept until OUT is there
      settings.json     what the run is; a second one with other settings is refused
      smoothed/         the model with scale moved, where the start's method does that
      start/            the PTQ result that training starts from (and falls back to)
      generated-*       sealed batches of text from the teacher, where there is no other
      trainer/          the Trainer's checkpoints, each sealed when it is durable, with the log so
                        far
      log.jsonl         loss and telemetry

The same command continues an interrupted run wherever it was: from the last checkpoint whose files
are as they were sealed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llmq.activations.keys_values import quantize_kv
from llmq.errors import LlmqError, VerificationError
from llmq.formats.load import load
from llmq.inference.module import quantized_modules
from llmq.models.arch import find_blocks
from llmq.models.experts import unfuse
from llmq.models.source import Source, meta_model
from llmq.models.tokens import fingerprint, first_token, own_tokenizer
from llmq.ptq.job import prepare as prepare_ptq
from llmq.ptq.methods import split_name
from llmq.ptq.run import quantize_folder
from llmq.qat import shards
from llmq.qat.job import QATJob
from llmq.qat.ship import is_published, ship
from llmq.qat.smoothing import FOLDER, is_smoothed, moved_in, write_smoothed
from llmq.qat.student import Student
from llmq.qat.trainer import (
    LOG,
    QATTrainer,
    ScheduleCallback,
    check_reporter,
    drop_unsound,
    last_checkpoint,
    restore_log,
    step_of,
    training_arguments,
)
from llmq.qat.weights import merge_lora, prepare
from llmq.storage import files
from llmq.storage.manifest import check_hashes
from llmq.storage.workspace import Workspace, remove_leftover, tell
from llmq.text import documents
from llmq.text.generate import generate_windows
from llmq.text.training import TokenWindows
from llmq.text.windows import identified

STATE = "settings.json"
Show = Callable[[str, int, int, str], None]


def work_dir_of(out_dir: Path) -> Path:
    """Beside the output; where that is a link, beside what it points to, so that a rename can
    publish it."""
    out_dir = files.real_path(out_dir)
    return out_dir.with_name(f".{out_dir.name}.qat")


class RunFolder(Workspace):
    """The folder of an unfinished run."""

    def __init__(self, work_dir: Path, identity: dict[str, Any]) -> None:
        super().__init__(work_dir, identity, STATE)

    def check_same(self, stored: Any, identity: dict[str, Any]) -> None:
        """Raise `LlmqError` that names what differs from the run that was started."""
        started = stored if isinstance(stored, dict) else {}
        different = [name for name in identity if identity[name] != started.get(name)]
        if different:
            name = different[0]
            raise LlmqError(
                f"{self.work_dir}: holds a run with other settings ({', '.join(different)}: "
                f"{started.get(name)!r} there, {identity[name]!r} now); give the same ones to "
                "continue it, or remove the folder"
            )


def check_output(out_dir: Path, overwrite: bool) -> None:
    """`files.check_output`, after removing what a run left behind that was killed when its output
    was in place already."""
    resolved = files.real_path(out_dir)
    if (resolved / files.MANIFEST).is_file():
        work_dir = work_dir_of(out_dir)
        remove_leftover(work_dir, STATE, lambda: is_published(work_dir, resolved))
        files.remove_aside(resolved)
    files.check_output(out_dir, overwrite)


def fine_tune(
    job: QATJob,
    out_dir: Path,
    *,
    overwrite: bool = False,
    report_to: str = "none",
    show: Show = lambda title, done, total, remark: None,
) -> dict[str, Any]:
    """Run a job into a folder and return its report. Continues an interrupted run of the same job.

    show: told of progress (title, done, total, remark). report_to: what the Trainer reports to,
    "none", "tensorboard" or "wandb". Raises `LlmqError` for bad input, `VerificationError` for a
    loss that is not finite."""
    check_reporter(report_to)
    state = job.processes
    folder = None
    if state.is_main_process:
        check_output(out_dir, overwrite)
        folder = RunFolder(work_dir_of(out_dir), job.identity())
    try:
        report = _fine_tune(job, out_dir, overwrite, report_to, show)
        if folder is not None:
            folder.remove()
    finally:
        if folder is not None:
            folder.close()
    state.wait_for_everyone()
    return report


def _fine_tune(
    job: QATJob, out_dir: Path, overwrite: bool, report_to: str, show: Show
) -> dict[str, Any]:
    state, device = job.processes, job.device
    started = time.monotonic()
    work_dir = work_dir_of(out_dir)
    state.wait_for_everyone()
    with state.main_process_first(), _nothing_kept_of_bad_input(work_dir):
        job = _with_text(job, work_dir, device, show)
        origin = _origin(job, work_dir, device, show)
        start = Source(_start(job, origin, work_dir, device, show))
    model = student_model(job, origin, start)
    assert job.windows is not None
    job.check_sources()
    trained = train(model, job, job.windows, work_dir, report_to=report_to, show=show)
    if not state.is_main_process:
        return {}
    if job.settings.shard:
        model = student_model(job, origin, start)
        model.load_state_dict(trained)
    seconds = time.monotonic() - started
    job = replace(job, moved=moved_in(origin.folder) if is_smoothed(job.recipe) else [])
    return ship(model.to("cpu"), job, start, work_dir, out_dir, overwrite, seconds)


@contextmanager
def _nothing_kept_of_bad_input(work_dir: Path) -> Iterator[None]:
    """Remove the work folder when the input is refused before there is anything to continue from:
    the settings alone, and what the start never got."""
    try:
        yield
    except LlmqError:
        if work_dir.is_dir() and {path.name for path in work_dir.iterdir()} <= {"settings.json"}:
            shutil.rmtree(work_dir, ignore_errors=True)
        raise


def _origin(job: QATJob, work_dir: Path, device: str, show: Show) -> Source:
    """What start and student are made of: the model, or the same with scale moved inside its
    blocks."""
    if not is_smoothed(job.recipe):
        return job.source
    folder = work_dir / FOLDER
    _drop_unsound(folder)
    if not folder.exists():
        total = len(find_blocks(meta_model(job.source.config))[1])
        write_smoothed(
            *(job.source, job.recipe, job.plans, _calibration(job).tokens, folder, device),
            lambda done: show("scale moved", done, total, ""),
        )
    return Source(folder)


def _drop_unsound(folder: Path) -> None:
    """Remove a folder of this run that is not as it was, so that it is made again."""
    if folder.exists() and not _is_sound(folder):
        tell(f"{folder}: is not as it was when it was finished; it is made again")
        files.remove(folder)


def _start(job: QATJob, origin: Source, work_dir: Path, device: str, show: Show) -> Path:
    """The PTQ result, made once, and again where it is not as it was."""
    start_dir = work_dir / "start"
    _drop_unsound(start_dir)
    if not start_dir.exists():
        assert job.windows is not None
        recipe = replace(job.recipe, method=split_name(job.recipe.method)[1])
        ptq = prepare_ptq(origin, recipe, calibration=_calibration(job))
        total, done = len(find_blocks(ptq.model)[1]), 0

        def on_block(report: Any) -> None:
            nonlocal done
            done += 1
            show(f"{job.recipe.method} start", done, total, f"{report.seconds:.1f} s/block")

        try:
            quantize_folder(ptq, start_dir, device=device, on_block=on_block)
        except VerificationError:
            # Too many layers fell back: nothing to train from, nor for the next attempt to find.
            shutil.rmtree(start_dir, ignore_errors=True)
            raise
    return start_dir


def _is_sound(start_dir: Path) -> bool:
    try:
        return check_hashes(start_dir).is_good
    except LlmqError:
        return False


def _calibration(job: QATJob) -> documents.TokenSet:
    """Windows that are trained on: the held-out ones judge the start, too, and with generated text
    there is no other."""
    assert job.windows is not None
    chosen = torch.randperm(
        len(job.windows), generator=torch.Generator().manual_seed(job.recipe.seed)
    )[: job.recipe.samples]
    # The windows begin with BOS where the family needs it.
    vocabulary = fingerprint(job.source.tokenizer)
    return documents.TokenSet(job.windows[chosen], job.train, vocabulary)


def _with_text(job: QATJob, work_dir: Path, device: str, show: Show) -> QATJob:
    """The job with its windows, which are written by the teacher where there is no other text; a
    few more than are trained on decide whether training helped."""
    if job.windows is not None:
        return job
    teacher = load(job.teacher, dtype="float32").to(device)
    tokenizer = own_tokenizer(job.source)
    bos = first_token(tokenizer, job.source.config)
    n_held_out = min(job.settings.n_held_out, -(-job.n_windows // 9))
    n = job.n_windows + n_held_out
    tokens = generate_windows(
        teacher,
        n,
        job.settings.sequence_length,
        work_dir,
        seed=job.settings.seed,
        bos=bos,
        on_batch=lambda done, total: show("generated", done, total, ""),
    )
    windows, held_out = tokens[: job.n_windows], tokens[job.n_windows :]
    policy = "none" if bos is None else "every-window"
    identity = [documents.token_hash(tokens)]  # there is no text beside the tokens
    return replace(
        job,
        windows=windows,
        held_out=identified(held_out, policy, identity, tokenizer) if len(held_out) else None,
    )


def student_model(job: QATJob, origin: Source, start_from: Source) -> PreTrainedModel:
    """The model in float32 with its quantized layers in training, starting from the PTQ result.
    origin: what that was made of."""
    settings = job.settings
    start = {
        name: module.qtensor()
        for name, module in quantized_modules(load(start_from, dtype="float32")).items()
    }
    model = load(origin, dtype="float32")
    unfuse(model)
    assert job.windows is not None
    prepare(
        model,
        start,
        settings.quantizer,
        settings.scheme.activations,
        lora_rank=settings.lora_rank,
        seed=settings.seed,
        n_steps=settings.n_steps(len(job.windows), job.processes.num_processes),
    )
    quantize_kv(model, settings.scheme.kv_bits, before_rope=settings.kv_before_rope)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


class _Progress(TrainerCallback):
    def __init__(self, show: Show) -> None:
        self.show = show

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.show(
                "training", state.global_step, state.max_steps, f"loss {float(logs['loss']):.4f}"
            )


def train(
    model: PreTrainedModel,
    job: QATJob,
    windows: Tensor,
    work_dir: Path,
    *,
    report_to: str = "none",
    show: Show = lambda title, done, total, remark: None,
) -> dict[str, Tensor]:
    """Train in place, from the last checkpoint in `work_dir` where there is one. Of a model that
    was split, returns what became of it, whole, in the first process."""
    settings = job.settings
    n_steps = settings.n_steps(len(windows), job.processes.num_processes)
    trainer_dir = work_dir / "trainer"
    teacher = load(job.teacher, dtype=job.teacher_dtype) if settings.loss.kl else None
    if teacher is not None and not settings.shard:  # which may be larger than a device
        teacher.to(job.processes.device)
    job.check_sources()
    log_path = work_dir / LOG
    student = Student(model, teacher, settings.loss)
    if settings.shard:
        name, _ = find_blocks(meta_model(job.source.config))
        shards.shard(student, model.get_submodule(name), job.device)
    callbacks = [
        ScheduleCallback(student, settings, job.held_out, log_path),
        _Progress(show),
    ]
    arguments = training_arguments(
        settings, n_steps, trainer_dir, device=job.device, report_to=report_to
    )
    trainer = QATTrainer(
        settings=settings,
        log_path=log_path,
        model=student,
        args=arguments,
        train_dataset=TokenWindows(windows),
        callbacks=callbacks,
    )
    trainer.telemetry(student)  # the codes that the first row counts flips from
    if job.processes.is_main_process:
        drop_unsound(trainer_dir)
    job.processes.wait_for_everyone()
    last = last_checkpoint(trainer_dir)
    if job.processes.is_main_process:
        restore_log(last, log_path)
    if (
        last is not None and step_of(last) >= n_steps
    ):  # interrupted after training; the Trainer would take one more step
        trainer.load_checkpoint(last)
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    settings.phases.apply(student, 1.0)
    if settings.shard:
        return shards.gathered(model)
    merge_lora(model)
    model.eval()
    return {}
