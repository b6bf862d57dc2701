"""What a fine-tuning run is, before anything is computed: model, teacher, text, settings, and every
check that can be made by then."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import PretrainedConfig

import llmq
from llmq.errors import LlmqError
from llmq.grid.spec import ActSpec
from llmq.inference.settings import read_settings
from llmq.models.arch import quantizable_layers
from llmq.models.source import Source
from llmq.models.stored import StoredModel
from llmq.models.tokens import first_token, own_tokenizer
from llmq.ptq.methods import method_of
from llmq.ptq.precision import multiplies_bfloat16
from llmq.ptq.sizing import MOST_WINDOWS, windows_for
from llmq.qat.budget import Memory, Size, training_flops
from llmq.qat.settings import PACKAGES, QATSettings
from llmq.qat.student import check_same_vocabulary, check_student
from llmq.qat.weights import check_quantizer
from llmq.recipe import LayerPlan, Recipe, Rule
from llmq.storage import files
from llmq.text import documents as data
from llmq.text.training import split_windows
from llmq.text.windows import Windows, identified
from llmq_kernels.core import restricted

GENERATED = "generated"


@dataclass(frozen=True)
class QATJob:
    """Everything known before anything is trained. windows: int64 `[n, T]`, or None while they are
    still to be generated. held_out: windows of the same text, or None where there are none. read:
    what was read of which rows of the text.
    teacher: the source itself where the model teaches itself. moved: scale that moved inside the
    blocks before anything was quantized, block by block, once it has."""

    source: Source
    teacher: Source
    settings: QATSettings
    recipe: Recipe
    train: str
    windows: Tensor | None
    held_out: Windows | None
    size: Size
    plans: list[LayerPlan]
    device: str
    remarks: dict[str, str] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    moved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_parameters(self) -> int:
        """Of the model, which are trained."""
        return self.size.n_parameters

    @property
    def sources(self) -> list[Source]:
        """The models that the run reads."""
        return [self.source] if self.teacher is self.source else [self.source, self.teacher]

    @property
    def model_dir(self) -> Path:
        """The folder of the model."""
        return self.source.folder

    @property
    def teacher_dir(self) -> Path:
        """The folder of the teacher."""
        return self.teacher.folder

    def check_sources(self) -> None:
        """Raise `LlmqError` when a file of model or teacher is no longer the one it was."""
        for source in self.sources:
            source.files.check()

    @property
    def notes(self) -> dict[str, str]:
        """Layers that differ from what was asked, and what is to be known of the model."""
        return {plan.layer.name: plan.note for plan in self.plans if plan.note} | self.remarks

    @property
    def teacher_dtype(self) -> str:
        """What the teacher is held and computed in: bfloat16 if it is stored so and the arithmetic
        of the run is bfloat16 anyway, else float32."""
        return (
            "bfloat16"
            if self.settings.precision == "bf16" and self.teacher.config.dtype == torch.bfloat16
            else "float32"
        )

    @property
    def processes(self) -> PartialState:
        """The processes that train together, under `accelerate launch` or `torchrun`; one
        otherwise."""
        return processes(self.device)

    @property
    def n_windows(self) -> int:
        """Windows that are trained on once."""
        if self.windows is not None:
            return len(self.windows)
        if self.settings.max_tokens:
            return -(-int(self.settings.max_tokens) // self.settings.sequence_length)
        return (self.settings.max_steps or 0) * self.settings.windows_per_step(
            self.processes.num_processes
        )

    def identity(self) -> dict[str, Any]:
        """What decides the result: a started run is continued only with all of it the same."""
        return {
            "model": str(self.model_dir),
            "teacher": str(self.teacher_dir),
            "train": self.train,
            "windows": None if self.windows is None else data.token_hash(self.windows),
            "recipe": self.recipe.to_json(),
            **self._settings_of_result(),
            "device": self.device,
            "weights of the model": files.stamps(self.model_dir.glob("*.safetensors")),
            "weights of the teacher": files.stamps(self.teacher_dir.glob("*.safetensors")),
            "contents of configs and tokenizers": [
                source.files.contents() for source in self.sources
            ],
            "software": {
                "llmq": llmq.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _settings_of_result(self) -> dict[str, Any]:
        """The settings, but for how the windows of a step are spread over processes and batches:
        ranges of activations alone follow the batches one by one."""
        settings = self.settings.to_json()
        del settings["batch_size"]
        if self.settings.scheme.activations != "int8-static":
            del settings["accumulation"]
        per_step = self.settings.windows_per_step(self.processes.num_processes)
        return {**settings, "windows per step": per_step}

    def budget(self) -> dict[str, Any]:
        """tokens, steps, peak memory in bytes of weights and optimizer and of activations, and
        floating-point operations of the training. Estimates."""
        n_processes = self.processes.num_processes
        steps = self.settings.n_steps(self.n_windows, n_processes)
        tokens = steps * self.settings.windows_per_step(n_processes) * self.settings.sequence_length
        config = self.source.config.get_text_config()
        teacher = 2 if self.teacher_dtype == "bfloat16" else 4
        memory = Memory.of(config, self.plans, self.settings, self.size, teacher, n_processes)
        return {
            "tokens": tokens,
            "steps": steps,
            "bytes": memory.weight_bytes,
            "activation_bytes": memory.activation_bytes,
            "flops": training_flops(self.size.n_multiplied, tokens),
        }


def prepare_job(
    model: str | Source,
    settings: QATSettings,
    *,
    train: str = data.BUNDLED,
    teacher: str | None = None,
    rules: tuple[Rule, ...] = (),
    revision: str | None = None,
    device: str = "cpu",
    strict: bool = False,
) -> QATJob:
    """Resolve and check everything that can be checked before computing. strict: refuse layers that
    differ from what was asked and stored tensors that are left out. Raises `LlmqError`."""
    restricted.adapt()
    check_engine()
    settings = settings.on(device)
    source = Source.open(model, revision)
    read_settings(source.folder)  # it comes along, and the result has to load
    if getattr(source.config, "quantization_config", None) is not None:
        raise LlmqError(
            f"{source.folder}: is quantized already; start from the full-precision model"
        )
    stored = StoredModel.of(source)
    check_student(stored.skeleton)
    stored.check()
    remarks = stored.remarks(strict)
    recipe = _recipe_of_start(settings, rules, stored.config)
    method_of(recipe)  # or it is refused here
    plans = recipe.plan(quantizable_layers(stored.skeleton))
    _check_plans(plans, settings, strict)
    _check_settings(settings, train, device)
    _check_processes(settings, processes(device).num_processes)
    taught_by = _teacher(source, teacher)
    check_same_vocabulary(stored.config, taught_by.config)
    if teacher:
        _check_same_tokens(taught_by, source)
    n_processes = processes(device).num_processes
    windows, held_out = None, None
    read: dict[str, Any] = {}
    if train != GENERATED:
        windows, held_out, read = _read_text(source, stored.config, settings, train, n_processes)
    # Or there is less than one step.
    settings.n_steps(0 if windows is None else len(windows), n_processes)
    return QATJob(
        source=source,
        teacher=taught_by,
        settings=settings,
        recipe=recipe,
        train=train,
        windows=windows,
        held_out=held_out,
        size=Size.of(stored.skeleton, plans),
        plans=plans,
        device=device,
        remarks=remarks,
        read=read,
    )


def _recipe_of_start(
    settings: QATSettings, rules: tuple[Rule, ...], config: PretrainedConfig
) -> Recipe:
    """How the quantized model is made that training starts from."""
    scheme = settings.scheme
    return Recipe(
        rules=(*rules, Rule("*", scheme.weights)),
        method=settings.init,
        samples=_start_samples(config, settings.sequence_length),
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        activations=ActSpec(scheme.activations, scheme.kv_bits, settings.kv_before_rope),
    )


def _check_plans(plans: list[LayerPlan], settings: QATSettings, strict: bool) -> None:
    """Raise where nothing would be quantized, where a layer's codes cannot be trained by the
    quantizer, and under `strict` where a layer differs from what was asked."""
    notes = [f"{plan.layer.name}: {plan.note}" for plan in plans if plan.differs]
    if strict and notes:
        raise LlmqError(
            f"--strict: {len(notes)} layers would differ from what was asked, the first being "
            f"{notes[0]}"
        )
    for plan in plans:
        if plan.spec is not None:
            check_quantizer(settings.quantizer, plan.spec, f"{plan.layer.name}: ")
    if not any(plan.spec for plan in plans):
        raise LlmqError(
            f"none of the {len(plans)} linear layers would be quantized: every one is kept by a "
            "rule, or no group size divides it"
        )


def _check_settings(settings: QATSettings, train: str, device: str) -> None:
    """Raise for text without an end, an optimizer that is not installed, and an arithmetic that the
    device does not have."""
    package = PACKAGES.get(settings.optimizer)
    if package is not None and find_spec(package) is None:
        raise LlmqError(
            f"--optimizer {settings.optimizer}: needs {package}, which is not installed: "
            f"pip install {package}"
        )
    if train == GENERATED and settings.max_tokens is None and settings.max_steps is None:
        raise LlmqError(
            "--train generated: give --max-tokens or --max-steps, since generated text has no end"
        )
    if settings.precision == "fp16" and device == "cpu":
        raise LlmqError(
            "--precision fp16 needs a GPU: CPUs have no fast float16 training; use bf16 or fp32"
        )
    if settings.precision != "bf16" or not device.startswith("cuda"):
        return
    if not multiplies_bfloat16(device):
        raise LlmqError(
            f"--precision bf16: {device} does not multiply bfloat16; use --precision fp16, or fp32"
        )


def _check_processes(settings: QATSettings, n: int) -> None:
    if settings.shard and n == 1:
        raise LlmqError(
            "--shard: there is one process, and nothing to split over; start several, with "
            "torchrun --nproc-per-node N -m llmq qat ... --shard"
        )


def _check_same_tokens(teacher: Source, student: Source) -> None:
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise LlmqError(
            f"{teacher.folder}: the teacher's tokenizer has other tokens than that of "
            f"{student.folder}; distillation needs the same tokenizer, so take a teacher of the "
            "same family"
        )


def _start_samples(config: Any, length: int) -> int:
    """Windows that the PTQ start is measured on: as much text as `llmq quantize` takes, in those of
    the training."""
    return max(1, min(MOST_WINDOWS, windows_for(config).n_tokens // length))


def _teacher(source: Source, teacher: str | None) -> Source:
    """The model that is learned from: the source itself where none is named, or its own folder."""
    if not teacher:
        return source
    opened = Source.open(teacher)
    return source if opened.folder == source.folder else opened


def processes(device: str) -> PartialState:
    """The processes that train together. They wait for the first one's PTQ start, which takes
    longer than the half hour that torch waits by itself."""
    return PartialState(cpu=device == "cpu", timeout=timedelta(hours=12))


def check_engine() -> None:
    """Raise `LlmqError` where accelerate was configured to split weights in its own way, which on
    CPUs would not be in effect without a word."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise LlmqError(
                f"llmq qat splits weights itself, not with accelerate's {name}; launch it without, "
                "and give --shard: accelerate launch --multi_gpu -m llmq qat ... --shard"
            )


def _read_text(
    source: Source, config: Any, settings: QATSettings, train: str, n_processes: int
) -> tuple[Tensor, Windows | None, dict[str, Any]]:
    """Windows to train on, held-out ones, and what was read (see `documents.Text`)."""
    tokenizer = own_tokenizer(source)
    text = data.read_text(train, "train", tokenizer)
    row = data.tokenize(text.documents, tokenizer)
    data.check_vocabulary(row, config.get_text_config().vocab_size, train)
    windows, held_out = split_windows(
        row,
        settings.sequence_length,
        settings.n_held_out,
        settings.windows_per_step(n_processes),
        train,
    )
    bos, policy = first_token(tokenizer, config), "none"
    if bos is not None:  # trained and judged as the model will be used
        windows[:, 0], held_out[:, 0], policy = bos, bos, "every-window"
    if not len(held_out):
        return windows, None, text.read
    return windows, identified(held_out, policy, text.documents, tokenizer), text.read
