"""What a step of quantization-aware training takes beside one of plain fine-tuning: time, and
memory at its peak.

    python scripts/benchmark_qat.py tiny
    python scripts/benchmark_qat.py MODEL --device cuda --batch-size 16 --sequence-length 1024

Forward, backward and the optimizer on random tokens. Every kind has a process of its own, for its
memory, and they take turns, so that whatever else the machine does hits all of them; medians of all
turns, without the first step of each. On a CPU memory is that of the whole process while it trains,
libraries included; on a GPU that of its tensors."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import llmq
from llmq.grid.spec import ActSpec
from llmq.ptq.precision import usual_precision
from llmq.qat.losses import LossWeights
from llmq.qat.student import Student
from llmq.recipe import Recipe

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATUS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Kind:
    """spec: of the weights, None for plain fine-tuning. The rest as in `llmq qat`."""

    spec: str | None = "w4g64"
    activations: str = "none"
    teacher: bool = False
    checkpointing: bool = False
    lora_rank: int | None = None
    optimizer: str = "adamw_torch"


KINDS = {
    "plain fine-tuning": Kind(None),
    "4 bits": Kind(),
    "4 bits, INT8 activations": Kind(activations="int8-token"),
    "plain, with a teacher": Kind(None, teacher=True),
    "4 bits, with a teacher": Kind(teacher=True),
    "the same, gradient checkpointing": Kind(teacher=True, checkpointing=True),
    "the same, LoRA of rank 16": Kind(teacher=True, checkpointing=True, lora_rank=16),
    "the same, 8-bit moments": Kind(teacher=True, checkpointing=True, optimizer="adamw_torch_8bit"),
}
FIRST = tuple(KINDS)[:3]


def student_of(model_name: str, kind: Kind, dtype: torch.dtype, device: str) -> Student:
    """A model in training that starts from plain rounding, or as it is where nothing is to be
    quantized."""
    model = llmq.load(model_name, dtype="float32")
    if kind.spec is not None:
        activations = ActSpec(kind.activations)  # type: ignore[arg-type]  # of the table above
        recipe = Recipe.uniform(kind.spec, method="rtn", activations=activations)
        llmq.prepare_qat(model, recipe, lora_rank=kind.lora_rank)
    if kind.checkpointing:
        model.gradient_checkpointing_enable()
    teacher: PreTrainedModel | None = None
    weights = LossWeights(kl=0, ce=1)
    if kind.teacher:
        teacher = llmq.load(model_name, dtype=str(dtype).removeprefix("torch.")).to(device)
        weights = LossWeights()
    return Student(model.to(device).train(), teacher, weights)


def optimizer_of(kind: Kind, student: Student) -> torch.optim.Optimizer:
    arguments = TrainingArguments(output_dir="unused", optim=kind.optimizer, learning_rate=1e-5)
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    trained = [each for each in student.parameters() if each.requires_grad]
    optimizer: torch.optim.Optimizer = made(trained, **options)
    return optimizer


def measured(args: argparse.Namespace, kind: Kind) -> dict[str, Any]:
    """Seconds of each step but the first, and the peak of memory in bytes, None where the system
    does not tell it."""
    dtype, is_on_gpu = PRECISIONS[args.precision], args.device != "cpu"
    student = student_of(args.model, kind, dtype, args.device)
    vocabulary = student.model.config.get_text_config().vocab_size
    shape = (args.batch_size, args.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, shape, generator=generator).to(args.device)
    optimizer = optimizer_of(kind, student)
    forget_peak(is_on_gpu)
    seconds = []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = student(tokens)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "peak": peak(is_on_gpu)}


def forget_peak(is_on_gpu: bool) -> None:
    """Loading a model takes memory, too, which is not training's."""
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif FORGET_PEAK.exists():
        FORGET_PEAK.write_text("5")


def peak(is_on_gpu: bool) -> int | None:
    if is_on_gpu:
        return torch.cuda.max_memory_allocated()
    if not STATUS.exists():
        return None
    return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024


def in_own_process(name: str, precision: str) -> dict[str, Any]:
    """What this script says of one kind when it is called for it alone."""
    command = [sys.executable, *sys.argv, "--only", name, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, found: list[dict[str, Any]], plain: float) -> str:
    """found: of every turn."""
    seconds = statistics.median(each for turn in found for each in turn["seconds"])
    peaks = [turn["peak"] for turn in found if turn["peak"] is not None]
    memory = f"{max(peaks) / 1e9:.2f}" if peaks else ""
    return f"| {name} | {seconds:.3f} | {seconds / plain:.2f} | {memory} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--precision", choices=PRECISIONS, help="as llmq qat has it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--all",
        action="store_true",
        help="with a teacher, too, and with what saves memory (8-bit moments are torchao's)",
    )
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.precision or usual_precision(args.device)
    return args


def main() -> None:
    args = parse_arguments()
    if args.only:
        print(json.dumps(measured(args, KINDS[args.only])))
        return
    names = KINDS if args.all else FIRST
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.turns):
        for name in names:
            found[name].append(in_own_process(name, args.precision))
    threads = "" if args.device != "cpu" else f", {torch.get_num_threads()} threads"
    print(
        f"{args.batch_size} x {args.sequence_length} tokens, {args.precision}, {args.device}"
        f"{threads}, torch {torch.__version__}\n\n"
        "| | seconds per step | times plain | peak, GB |\n|---|---|---|---|"
    )
    plain = statistics.median(each for turn in found[FIRST[0]] for each in turn["seconds"])
    for name in names:
        print(row(name, found[name], plain))


if __name__ == "__main__":
    main()
